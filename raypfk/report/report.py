"""`raypfk report`: a study is opened, what its files say is gathered and drawn, and the page is written."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import yaml

from raypfk import config as configs
from raypfk import store, study, trust
from raypfk.report import examples, figures, gather, page, published, tables
from raypfk.report.examples import Example
from raypfk.report.gather import Curves
from raypfk.report.page import Picture, picture
from raypfk.report.tables import Table, count
from raypfk.run import Run
from raypfk.stages.quality import rare_classes
from raypfk.study import Study

INDEX = "index.html"
SHOWN_ROUND = 3
"""Whose confusion matrices, features and choices are shown, or the last before: the paper's Figure 6 has b = 3."""
CHOICES = 12


class Comparison(NamedTuple):
    """Of all cells. rounds: that all have."""

    rounds: int
    baseline: str | None
    headline: Table
    accuracy: Picture
    minority: Picture | None
    published: "Beside | None"
    significance: Table | None
    by_round: Table
    selected: list[Picture]
    estimates: Table | None
    passes: Table

    @property
    def pictures(self) -> list[Picture]:
        beside = [self.published.picture] if self.published else []
        return [drawn for drawn in (self.accuracy, self.minority, *beside, *self.selected) if drawn]


class Beside(NamedTuple):
    """The paper's figure and ours. what: which figure it is, and what of ours differs."""

    what: str
    picture: Picture
    table: Table | None


class Shown(NamedTuple):
    """One run that stands for its cell, at a round. trained: the round whose network drew the embedding."""

    cell: str
    seed: int
    strategy: str
    round: int
    confusion: Picture
    embedding: Picture | None
    trained: int | None
    bought: Picture
    choices: list[Example]

    @property
    def pictures(self) -> list[Picture]:
        return [drawn for drawn in (self.confusion, self.embedding, self.bought) if drawn]


class Made(NamedTuple):
    """commands: (what it did, the command), None if nobody wrote it down. differences: by cell, of its configuration
    from that of the first, which is `config`."""

    commands: list[tuple[str, str | None]]
    versions: list[str]
    first: str
    config: str
    differences: dict[str, list[str]]


def write(uri: str, out: str | None, command: str) -> str:
    """The report on a run or an experiment: `out`/index.html, its figures as PNGs beside it. Returns where the page is.

    out: None is the folder `report` of what is reported. command: what made it, as the page says. UserError where
    neither is, or a file is not as it must be.
    """
    opened = study.open_study(uri)
    out = store.absolute(out) if out else store.join(opened.uri, "report")
    cells = gather.curves(opened, study.table(opened))
    stand = {cell.name: gather.first(cell) for cell in opened.cells}
    stand = {name: found for name, found in stand.items() if found}
    comparison = _comparison(opened, cells, stand) if cells else None
    pool = _pool(next(iter(stand.values()))[1]) if stand else None
    shown = [_shown(number, name, *found) for number, (name, found) in enumerate(stand.items(), 1)]
    html = page.render(
        title=opened.title,
        facts=_facts(opened, cells),
        missing=gather.unfinished(opened),
        comparison=comparison,
        pool=pool,
        shown=shown,
        outlook=tables.outlook(stand),
        warnings=_warnings(stand),
        made=_made(opened, command),
    )
    for drawn in [*(comparison.pictures if comparison else []), *([pool] if pool else []), *_pictures(shown)]:
        store.write_bytes(store.join(out, drawn.name), drawn.png)
    index = store.join(out, INDEX)
    store.write_bytes(index, html.encode())  # last: a page that is there has its pictures beside it
    return index


def _pictures(shown: list[Shown]) -> list[Picture]:
    return [drawn for cell in shown for drawn in cell.pictures]


# -------------------------------------------------------------------------------------------------- what was compared


def _facts(opened: Study, cells: list[Curves]) -> dict[str, str]:
    runs = [run for _, _, run in opened.runs()]
    if not runs:
        return {}
    pools, setups = [run.pool for run in runs], [run.config for run in runs]
    sizes = {split: _span(pool.rows(split) for pool in pools) for split in ("pool", "validation", "test")}
    budget, rounds = _span(c.budget for c in setups), _span(c.rounds for c in setups)
    bought = _span(int(cell.bought_B[-1]) for cell in cells) if cells else "0"
    models = " and ".join(dict.fromkeys(f"{c.model.name}, {c.train.epochs} epochs a round" for c in setups))
    return {
        "Data": f"{_source(runs[0])}, {runs[0].classes} classes; {sizes['pool']} images in the pool, "
        f"{sizes['test']} in the test set",
        "Imbalance": _imbalance(runs),
        "Labels": f"{budget} a round for {rounds} rounds, {bought} bought so far; beside them {sizes['validation']} "
        "labels of the validation set, which were there before the first round",
        "Network": models,
        "Seeds": _seeds(opened),
    }


def _span(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    return count(numbers[0]) if len(numbers) == 1 else f"{count(numbers[0])} to {count(numbers[-1])}"


def _source(run: Run) -> str:
    data = run.pool.manifest["data"]
    return data["source"] + (f" ({data['root']})" if data.get("root") else "")


def _imbalance(runs: list[Run]) -> str:
    run, one = runs[0], len({str(run.pool.manifest["imbalance"]) for run in runs}) == 1
    where = "pool" if one else "first run's pool"
    made, names = run.pool.manifest["imbalance"], gather.class_names(run)
    rare = rare_classes(run)
    if not made or not rare:
        return "none was made"
    which = ", ".join(names[label] for label in rare) if len(rare) <= figures.FEW else f"{len(rare)} of {len(names)}"
    ratio = (run.pool.manifest["data"]["imbalance"] or {}).get("ratio")
    return (f"{ratio:g}x: " if ratio else "") + (
        f"of the classes {which} together {count(made.get('rare_kept'))} images are in the {where}, "
        f"of all others {count(made.get('others'))}"
    )


def _seeds(opened: Study) -> str:
    by_cell = {cell.name: ", ".join(map(str, cell.runs)) for cell in opened.cells if cell.runs}
    if len(set(by_cell.values())) == 1:
        return next(iter(by_cell.values()))
    return "; ".join(f"{name}: {seeds}" for name, seeds in by_cell.items())


def _comparison(opened: Study, cells: list[Curves], stand: dict[str, tuple[int, Run]]) -> Comparison:
    rounds = gather.common_rounds(cells)
    baseline = gather.baseline(cells, rounds)
    validation = {name: _validation(run) for name, (_, run) in stand.items()}
    best = ("best_epoch_accuracy", "best on test (as published)")
    best = best if any(cell.known(best[0]) for cell in cells) else None
    look = figures.looks([cell.name for cell in cells])
    return Comparison(
        rounds,
        baseline.name if baseline else None,
        tables.headline(cells, rounds, baseline, validation),
        picture(
            "accuracy",
            figures.curves(cells, ("test_accuracy", "last epoch"), best, "test accuracy (%)", look),
            "Test accuracy over labels bought, a line for each cell; the numbers are in the table of rounds.",
        ),
        _line("minority", cells, "minority_accuracy", "accuracy of minority classes (%)", "last epoch"),
        _beside_published(opened.figure, cells, next(iter(stand.values()))[1]),
        tables.significance(cells, rounds),
        tables.by_round(cells, "test_accuracy"),
        _selected(cells),
        tables.estimates(cells),
        tables.passes(stand, cells, rounds),
    )


def _validation(run: Run) -> str:
    labels = count(run.pool.rows("validation"))
    return f"{labels}, {'used' if gather.asks_validation(run) else 'not used'}"


def _line(
    name: str, cells: list[Curves], column: str, title: str, solid: str, dashed: tuple[str, str] | None = None
) -> Picture | None:
    """None where no cell knows either column."""
    known = [cell for cell in cells if cell.known(column) or (dashed and cell.known(dashed[0]))]
    if not known:
        return None
    look = figures.looks([cell.name for cell in cells])
    drawn = figures.curves(known, (column, solid), dashed, title, look)
    return picture(name, drawn, f"{title[0].upper()}{title[1:]} over labels bought, a line for each cell.")


def _selected(cells: list[Curves]) -> list[Picture]:
    lines = [
        _line("minority-share", cells, "minority_share", "minority share of the selection (%)", "a round's selection"),
        _line(
            *("estimates", cells, "pool_estimates", "estimated labels that are right (%)", "of the pool"),
            ("selected_estimates", "of the selection"),
        ),
        _line(
            *("minority-estimates", cells, "minority_recall", "estimated to be of a minority class (%)", "recall"),
            ("minority_precision", "precision"),
        ),
    ]
    return [line for line in lines if line]


def _beside_published(figure: str | None, cells: list[Curves], run: Run) -> Beside | None:
    """run: one of the study's."""
    budget, data = run.config.budget, run.pool.manifest["data"]
    found = published.figure(figure, budget) if figure else None
    if not found:
        return None
    ours = (data["source"], (data["imbalance"] or {}).get("ratio", 1))
    what = f"Figure {found.name}: {found.dataset}, imbalance {found.imbalance}x. "
    if ours != (found.dataset, found.imbalance):
        what += f"This study has other data ({ours[0]}, {ours[1]:g}x): compare shapes, not numbers. "
    what += f"{found.percent:g} % of the pool before its imbalance stand for one round's {budget:,} labels"
    drawn = figures.beside_published(cells, found, figures.looks([cell.name for cell in cells]))
    alt = f"Test accuracy over labels bought, beside the paper's figure {found.name}."
    return Beside(what, picture("published", drawn, alt), tables.beside_published(cells, found))


# ------------------------------------------------------------------------------------------------- one run of a cell


def _pool(run: Run) -> Picture:
    """Of the splits whose labels are known to the files, if only to the simulated oracle."""
    counts = {
        "pool, hidden labels": gather.split_counts(run, "pool"),
        "validation": gather.split_counts(run, "validation"),
    }
    counts = {name: counts_D for name, counts_D in counts.items() if counts_D is not None}
    drawn = figures.class_counts(counts, gather.class_names(run), rare_classes(run))
    return picture("classes", drawn, f"Images of each class: {' and '.join(counts)}.")


def _shown(number: int, cell: str, seed: int, run: Run) -> Shown:
    shown_round = min(SHOWN_ROUND, gather.rounds_done(run))
    names, slug = gather.class_names(run), f"{number}-{re.sub('[^a-z0-9]+', '-', cell.lower()).strip('-')}"
    confusion_DD = gather.confusion(run, shown_round)
    accuracy = confusion_DD.trace() / max(1, confusion_DD.sum())
    embedded = gather.embedding(run, shown_round)
    return Shown(
        cell,
        seed,
        run.config.strategy,
        shown_round,
        picture(
            f"confusion-{slug}",
            figures.confusion(confusion_DD, names, f"{cell}, round {shown_round}: {100 * accuracy:.1f} % right"),
            f"Confusion matrix of {cell} on the test set after round {shown_round}.",
        ),
        embedded
        and picture(
            f"features-{slug}",
            figures.embedding(embedded, names, f"{cell}, validation set after round {embedded.trained}"),
            f"t-SNE of the validation set's features under the network of {cell} after round {embedded.trained}.",
        ),
        embedded and embedded.trained,
        picture(
            f"bought-{slug}",
            figures.bought(gather.bought_counts(run), names, f"{cell}, seed {seed}"),
            f"Labels of each class that {cell} bought, round by round.",
        ),
        examples.examples(run, shown_round, CHOICES),
    )


def _warnings(stand: dict[str, tuple[int, Run]]) -> dict[str, list[str]]:
    """Each warning once, and the cells whose run it is of."""
    found: dict[str, list[str]] = {}
    for name, (_, run) in stand.items():
        for sentence in trust.warnings(run):
            found.setdefault(sentence, []).append(name)
    return found


# -------------------------------------------------------------------------------------------------- how it was made


def _made(opened: Study, command: str) -> Made | None:
    runs = {cell.name: next(iter(cell.runs.values())) for cell in opened.cells if cell.runs}
    if not runs:
        return None
    (name, first), *others = runs.items()
    records = [store.read_json(store.join(run.uri, "run.json")) for _, _, run in opened.runs()]
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()) for r in records)
    return Made(
        [("the runs", opened.command), ("this page", command)],
        list(versions),
        name,
        yaml.safe_dump(first.config.model_dump(mode="json"), sort_keys=False),
        {other: configs.differences(first.config, run.config) for other, run in others},
    )
