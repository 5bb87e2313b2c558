"""One stage of one round: `ray job submit --working-dir . -- python jobs/extract.py RUN --round 1`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts jobs/ first on the path, where label.py or evaluate.py would hide packages of these names; raypfk
    # lies one folder up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from raypfk.cli import extract, run_command

    run_command(extract)
