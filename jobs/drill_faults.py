"""Runs that faults strike at random times, on a Ray of several nodes and a store over HTTP, and what became of them.

    python jobs/drill_faults.py --runs 34 --seed 1
    python jobs/drill_faults.py --runs 4 --only "node killed" --only "S3: 503" --keep logs

A first run is left alone. Of each other one it is expected that, after as many starts of the same command as it needs,
it selects what the first did, in that order, that its networks come to the same weights, that every image is accounted
for once, and that `raypfk verify` finds nothing. A developer's tool: it runs from a checkout, as the store is that of
tests/.
"""

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from jobs.drill.account import account
from jobs.drill.faults import FAULTS, LEFT_OUT, Fault
from jobs.drill.place import BUCKET, MOST_STARTS, Failure, Missed, Place, Trial, Undisturbed
from tests import faulty_s3, rados_gateway, tiny

LATER_S = 8.0
FOLDER = {"source": "folder", "root": f"s3://{BUCKET}/images", "validation": 120, "test": 80, "shard_rows": 32}
GREY = {"size": 16, "resize": 16, "channels": 1}
CONFIGURATIONS = {
    "digits": {"data__shard_rows": 32, "resources": {"extract_actors": 2, "score_actors": 1}},
    "copied": {"data": FOLDER, "image": GREY},
    "by reference": {"data": FOLDER | {"by_reference": True}, "image": GREY},
}


@dataclass
class Outcome:
    """Of one run. extra: seconds more than the undisturbed run took."""

    kind: str
    injected: int = 0
    starts: int = 0
    lost: int = 0
    duplicated: int = 0
    equal: bool = False
    clean: bool = False
    extra: float = 0.0
    failure: str = ""

    @property
    def good(self) -> bool:
        return self.equal and self.clean and not (self.lost or self.duplicated or self.failure)


class Drill:
    def __init__(self, place: Place, logs: Path, rounds: int, seed: int):
        self.place, self.logs, self.rounds, self.rng = place, logs, rounds, random.Random(seed)
        self.undisturbed: dict[str, Undisturbed] = {}

    def trial(self, name: str, configuration: str, fraction: float = 0.0) -> Trial:
        log = self.logs / name
        log.mkdir(parents=True)
        settings = tiny.config(**CONFIGURATIONS[configuration], rounds=self.rounds, train__epochs=10)
        path = log / "run.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump()))
        rng = random.Random(self.rng.random())
        return Trial(self.place, rng, path, f"s3://{BUCKET}/{name}", log, fraction)

    def alone(self, configuration: str) -> Undisturbed:
        """A run that nothing disturbs, made when it is first asked for."""
        if configuration not in self.undisturbed:
            trial = self.trial(f"undisturbed-{configuration}", configuration)
            if configuration == "copied":
                self.place.spoil(trial.rng)
            self.place.s3.requests.clear()
            began = time.monotonic()
            trial.start()
            if trial.wait():
                raise click.ClickException(f"the undisturbed run fails: {trial.said()[-2000:]}")
            seconds, requests = time.monotonic() - began, self.place.requests()
            blocks = sum(-(-size // 4096) for size in trial.files().values())
            self.undisturbed[configuration] = Undisturbed(seconds, account(trial, self.rounds), requests, blocks)
            print(f"undisturbed, {configuration}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return self.undisturbed[configuration]

    def run(self, number: int, fault: Fault) -> Outcome:
        """One run that the fault struck: where it came too late, it comes earlier in another."""
        fraction = self.rng.uniform(0.0, 0.9)  # later, the run is over before the fault is there
        while True:
            name = f"{number:03d}-{fault.name.replace(': ', '-').replace(' ', '-')}-{fraction:.3f}"
            trial = self.trial(name, fault.configuration, fraction)
            try:
                return self._run(trial, fault)
            except Missed as missed:
                trial.note(f"missed: {missed}")
                fraction *= 0.6
            finally:
                trial.end()
                fault.restore(trial)
                self.place.mend_ray()

    def _run(self, trial: Trial, fault: Fault) -> Outcome:
        outcome = Outcome(fault.name)
        try:
            seconds, expected, *_ = trial.undisturbed = self.alone(fault.compared_with)
            fault.prepare(trial)
            self.place.s3.requests.clear()
            began = time.monotonic()
            trial.start()
            if fault.timed:
                self._wait(trial)
            trial.note(f"{fault.name} strikes")
            fault.strike(trial)
            self._to_the_end(trial, fault)
            outcome.extra = time.monotonic() - began - seconds
            found = account(trial, self.rounds, expected.images)
            outcome.lost, outcome.duplicated, outcome.clean = found.lost, found.duplicated, found.clean
            outcome.equal = (found.selections, found.weights) == (expected.selections, expected.weights)
        except Missed:
            raise
        except Exception as failure:  # the drill's own trouble is one run's, too
            outcome.failure = f"{type(failure).__name__}: {failure}"
            trial.note(traceback.format_exc())
        outcome.injected, outcome.starts = trial.injected, trial.starts
        return outcome

    def _wait(self, trial: Trial) -> None:
        """Until the drawn share of the requests has come, however slow the machine is; and then some seconds, for what
        asks the store for nothing."""
        wanted = trial.fraction * trial.undisturbed.requests
        trial.wait_until(lambda: self.place.requests() >= wanted, f"{wanted:.0f} requests")
        until = time.monotonic() + trial.rng.uniform(0, LATER_S)
        trial.wait_until(lambda: time.monotonic() >= until, f"{wanted:.0f} requests, and some seconds")

    def _to_the_end(self, trial: Trial, fault: Fault) -> None:
        while True:
            code = trial.wait()
            trial.note(f"driver {trial.starts} ended with {code}")
            fault.ended(trial, code)
            if code == 0:
                return
            if trial.starts == MOST_STARTS:
                raise Failure(f"{MOST_STARTS} starts were not enough")
            trial.start()


def kinds(runs: int, only: tuple[str, ...], rng: random.Random) -> list[str]:
    """All of them in turns, each turn in another order."""
    drawn: list[str] = []
    while len(drawn) < runs:
        turn = list(only or FAULTS)
        rng.shuffle(turn)
        drawn += turn
    return drawn[:runs]


def table(outcomes: list[Outcome]) -> str:
    columns = ("runs", "faults", "lost", "twice", "equal", "clean", "starts", "extra s")
    lines = ["fault".ljust(20) + "".join(name.rjust(9) for name in columns)]
    for kind in dict.fromkeys(o.kind for o in sorted(outcomes, key=lambda o: list(FAULTS).index(o.kind))):
        of = [o for o in outcomes if o.kind == kind]
        sums = [
            sum(getattr(o, name) for o in of) for name in ("injected", "lost", "duplicated", "equal", "clean", "starts")
        ]
        numbers = [len(of), *sums, round(statistics.median(o.extra for o in of))]
        lines.append(kind.ljust(20) + "".join(f"{number:9,}" for number in numbers))
    return "\n".join(lines)


@click.command()
@click.option("--runs", default=34, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the kinds' order and the times.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)), help="Kinds; default: all.")
@click.option("--rounds", default=2, show_default=True, help="Of each run.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the logs of all drivers.")
@click.option("--store", type=click.Choice(list(rados_gateway.STORES)), default="moto", show_default=True)
def main(runs, seed, only, rounds, keep, store):
    scratch = Path(tempfile.mkdtemp(prefix="drill-"))
    logs = keep or scratch / "logs"
    outcomes = []
    if LEFT_OUT:
        print(f"left out, as they need root: {', '.join(LEFT_OUT)}", file=sys.stderr)
    with rados_gateway.STORES[store]() as behind, faulty_s3.running(behind, address()) as s3:
        place = Place(scratch, s3)
        place.start_ray()
        try:
            drill = Drill(place, logs, rounds, seed)
            for number, kind in enumerate(kinds(runs, only, random.Random(seed))):
                outcome = drill.run(number, FAULTS[kind])
                outcomes.append(outcome)
                say(number, outcome)
        except KeyboardInterrupt:
            print(f"interrupted after {len(outcomes)} of {runs} runs", file=sys.stderr)
        finally:
            place.stop_ray()
            shutil.rmtree(scratch, ignore_errors=True)
    print(table(outcomes))
    print(json.dumps({
        "name": "drill_faults", "runs": len(outcomes), "faults": sum(o.injected for o in outcomes),
        "lost": sum(o.lost for o in outcomes), "duplicated": sum(o.duplicated for o in outcomes),
        "selections_equal": sum(o.equal for o in outcomes), "verified": sum(o.clean for o in outcomes),
        "failed": sum(not o.good for o in outcomes), "starts": sum(o.starts for o in outcomes),
        "undisturbed_s": {name: round(alone.seconds, 1) for name, alone in drill.undisturbed.items()},
    }))  # fmt: skip
    sys.exit(0 if len(outcomes) == runs and all(outcome.good for outcome in outcomes) else 1)


def address() -> str:
    """Of this machine, as hosts beside it know it."""
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def say(number: int, outcome: Outcome) -> None:
    how = "good" if outcome.good else f"BAD {outcome.failure}"
    print(
        f"{time.strftime('%H:%M:%S')} {number:3d} {outcome.kind}: {how}; {outcome.injected} faults, {outcome.starts} "
        f"starts, {outcome.extra:.0f} s more, lost {outcome.lost}, twice {outcome.duplicated}, equal {outcome.equal}, "
        f"clean {outcome.clean}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
