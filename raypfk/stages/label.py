"""Label: the oracle. Simulated, from the pool's hidden labels, or a person's answers in a file."""

import io
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from raypfk import store
from raypfk.errors import UserError, WaitingForLabels
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION
from raypfk.sources.labels import column_names, csv_bytes, expect_once


def label(run: Run, round: int) -> dict:
    """Write round `round`'s labels.parquet: one label for each selected image.

    Raises WaitingForLabels (after it wrote to_label.csv) where a person has not answered yet.
    """
    selected = run.read(run.round(round).selection, SELECTION)["image_id"].combine_chunks()
    labels = _simulated(run, selected) if run.config.oracle == "simulated" else _answers(run, round, selected)
    source = "simulated" if run.config.oracle == "simulated" else "file"
    table = pa.table([selected, labels, pa.array([source] * len(selected), pa.string())], schema=LABELS)
    before = run.labelled(round)["image_id"]
    if again := table.filter(pc.is_in(table["image_id"], before.combine_chunks())).num_rows:
        raise UserError(f"{run.round(round).selection}: {again} of its images were labelled in an earlier round")
    run.write(run.round(round).labels, table)
    return {"labelled": len(selected)}


def _simulated(run: Run, selected: pa.Array) -> pa.Array:
    known = run.pool.labels_of(selected.to_pylist())
    return pa.array([known[image_id] for image_id in selected.to_pylist()], pa.int64())


def _answers(run: Run, round: int, selected: pa.Array) -> pa.Array:
    """labels.csv: image_id and label (a class name or index), every selected image once and no other."""
    files = run.round(round)
    names = [*map(str, run.pool.classes)]
    if not store.exists(files.answers):
        sink = pa.BufferOutputStream()
        empty = pa.table({"image_id": selected, "label": pa.nulls(len(selected), pa.string())})
        pa.csv.write_csv(empty, sink)
        if not store.exists(files.to_label):  # a person may have filled it in where it lies
            store.write_bytes(files.to_label, sink.getvalue())
        raise WaitingForLabels(
            f"{len(selected)} images wait for a label: fill in {files.to_label} (classes: {', '.join(names[:20])}"
            f"{', …' if len(names) > 20 else ''}), save it as {files.answers} and run the same command again"
        )
    answers = _read_csv(files.answers)
    ids = answers["image_id"].to_pylist()
    if twice := [i for i, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{files.answers}: image {twice[0]!r} is there {ids.count(twice[0])} times, expected once")
    if strange := sorted(set(ids) - set(selected.to_pylist())):
        raise UserError(f"{files.answers}: {strange[0]!r} was not selected in round {round} of {run.uri}")
    given = dict(zip(ids, answers["label"].to_pylist(), strict=True))
    return pa.array([_class(given.get(i), names, i, files.answers) for i in selected.to_pylist()], pa.int64())


def _read_csv(uri: str) -> pa.Table:
    as_text = pa.csv.ConvertOptions(
        column_types={"image_id": pa.string(), "label": pa.string()}, include_columns=["image_id", "label"]
    )
    try:
        data = csv_bytes(uri)
        expect_once(uri, column_names(uri), ["image_id", "label"])
        return pa.csv.read_csv(io.BytesIO(data), convert_options=as_text)
    except (pa.ArrowInvalid, KeyError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{uri}: expected CSV with the columns image_id,label: {message}") from None


def _class(answer: str | None, names: list[str], image_id: str, uri: str) -> int:
    if answer in names:
        return names.index(answer)
    # An index is taken only where no class is named by a number: class "10" may have index 1.
    if answer in map(str, range(len(names))) and not any(n.isdigit() for n in names):
        return int(answer)
    came = "no label" if not answer else repr(answer[:60])
    raise UserError(f"{uri}: image {image_id!r}: expected one of the classes {', '.join(names[:20])}, found {came}")
