"""What a run directory says of itself."""

from rich.console import Console
from rich.table import Table

from raypfk import store, trust
from raypfk.loop import STAGES, images_left
from raypfk.run import Run

METRICS = {"labelled": int, "test_accuracy": float}
PLATEAU = 0.05
"""A p below it is called a difference."""
TOO_LITTLE = "less than the validation set can show"


def read(run_dir: str) -> dict:
    """{run, strategy, label_estimator, seed, budget, rounds, finished, done: [{round, stages, labelled, ...}]}."""
    run = Run.open(run_dir)
    config, done = run.config, []
    for number in range(config.rounds + 1):
        stages = [name for name in STAGES if run.done(number, name)]
        if not stages:
            break
        metrics = store.read_record(run.round(number).metrics, METRICS) if "evaluate" in stages else {}
        markers = {name: run.done(number, name) for name in stages}
        done.append(
            {
                "round": number,
                "stages": stages,
                "labelled": metrics.get("labelled"),
                "test_accuracy": metrics.get("test_accuracy"),
                "seconds": {name: marker["seconds"] for name, marker in markers.items()},
            }
        )
    return {
        "run": run.uri,
        "strategy": config.strategy,
        "label_estimator": config.label_estimator,
        "seed": config.seed,
        "budget": config.budget,
        "rounds": config.rounds,
        "finished": _finished(run, done),
        "done": done,
    }


def with_trust(state: dict) -> dict:
    """What `read` gave, and: trust, the last row of `trust.of` or None; warnings, sentences. Reads more than `read`."""
    row, warnings = trust.latest(Run.open(state["run"]))
    return state | {"trust": row, "warnings": warnings}


def _finished(run: Run, done: list[dict]) -> bool:
    if not done or done[-1]["test_accuracy"] is None:
        return False
    return len(done) == run.config.rounds + 1 or not images_left(run, len(done))


def show(state: dict) -> None:
    """Prints what `with_trust` gave."""
    console = Console(highlight=False)
    state_of = "finished" if state["finished"] else "not finished"
    console.print(
        f"{state['run']}: {state['strategy']}, S={state['label_estimator']}, seed {state['seed']}, "
        f"{state['budget']} images a round, {state['rounds']} rounds, {state_of}",
        soft_wrap=True,
        markup=False,
    )
    table = Table("round", "labelled", "test accuracy", "seconds", "stages done", box=None, pad_edge=False)
    for row in state["done"]:
        accuracy = row["test_accuracy"]
        table.add_row(
            str(row["round"]),
            "" if row["labelled"] is None else f"{row['labelled']:,}",
            "" if accuracy is None else f"{100 * accuracy:.2f} %",
            f"{sum(row['seconds'].values()):.1f}",
            _stages(row),
        )
    console.print(table)
    if state["trust"] and state["trust"]["validation_accuracy"] is not None:
        console.print(_outlook(state["trust"], state["budget"]), soft_wrap=True, markup=False)
    for text in state["warnings"]:
        console.print(f"warning: {text}", soft_wrap=True, markup=False)


def _outlook(row: dict, budget: int) -> str:
    parts = [
        f"round {row['round']}'s network gets {100 * row['validation_accuracy']:.1f} % of the validation set right"
    ]
    if (p := row["plateau"]) is not None:
        differs = "differs from" if p < PLATEAU else "may be no other than"
        parts.append(f"it {differs} the one {trust.APART} rounds before (p = {p:.2g})")
    if row["worth_buying"] is None:
        parts.append("what more labels would bring is not known yet")
    else:
        worth = f"about {row['worth_buying']:,} labels are worth buying" if row["worth_buying"] else TOO_LITTLE
        parts.append(f"the next {budget:,} labels may gain {100 * row['expected_gain']:.2f} points, {worth}")
    return "; ".join(parts)


def _stages(row: dict) -> str:
    if row["round"] == 0:
        return "initial weights"
    return "all" if len(row["stages"]) == len(STAGES) else " ".join(row["stages"])
