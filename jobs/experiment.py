"""Runs side by side: `ray job submit --working-dir . -- python jobs/experiment.py EXPERIMENT --out DIR`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts jobs/ first on the path, where label.py or evaluate.py would hide packages of these names; raypfk
    # lies one folder up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from raypfk.cli import experiment, run_command

    run_command(experiment)
