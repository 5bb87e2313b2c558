"""What is held out of a source's training images, and which classes are made rare: drawn by the seed."""

import numpy as np

from raypfk.config import DataConfig, ImbalanceConfig, Share
from raypfk.errors import UserError
from raypfk.sources.listing import UNKNOWN, Entries, Listing

_STREAMS = {"validation": 1, "test": 2, "classes": 3, "imbalance": 4}


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """One stream per purpose: another test share does not draw another validation set."""
    return np.random.Generator(np.random.PCG64([seed, _STREAMS[purpose]]))


def split(listing: Listing, data: DataConfig, seed: int) -> tuple[dict[str, Entries], dict | None]:
    """Entries of "pool", "validation" and "test", and what the imbalance did (None without).

    Shares are of all training images; validation is drawn first, then test, then the rare classes are cut.
    """
    train, taken = listing.train, {}
    left = np.arange(len(train))
    for name in ("validation", "test"):
        share, own = getattr(data, name), getattr(listing, name)
        if share is not None and own is not None:
            where = f"data.{name}_root is given" if data.source == "folder" else f"{data.source} has its own"
            raise UserError(f"data.{name}: nothing to hold out, {where}")
        if share is None:
            taken[name] = own if own is not None else train.take(left[:0])
            continue
        chosen = _hold_out(train, left, share, listing.classes, _generator(seed, name), f"data.{name}")
        taken[name] = train.take(chosen)
        left = np.setdiff1d(left, chosen)
    made = None
    if data.imbalance is not None:
        left, made = _imbalance(train, left, listing.classes, data.imbalance, seed)
    return {"pool": train.take(left)} | taken, made


def _hold_out(
    train: Entries, left: np.ndarray, share: Share, classes: list[str] | None, draw: np.random.Generator, field: str
) -> np.ndarray:
    """Rows out of `left`, the same number of each class; what is over goes to the largest classes, one each."""
    if train.labels is None:
        raise UserError(f"{field}: {share} cannot be taken evenly over classes: the images have no labels")
    left = left[train.labels[left] != UNKNOWN]
    count = share if isinstance(share, int) else round(share * len(train))
    if not 0 < count <= len(left):
        raise UserError(f"{field}: {share} is {count} images, expected 1 to {len(left)} (of {len(train)})")
    sizes = np.bincount(train.labels[left], minlength=len(classes))
    quota = np.full(len(classes), count // len(classes))
    quota[np.argsort(-sizes, kind="stable")[: count % len(classes)]] += 1
    for label in np.flatnonzero(sizes < quota):
        raise UserError(f"{field}: class {classes[label]!r} has {sizes[label]} images left, {quota[label]} are needed")
    return np.concatenate(
        [draw.choice(left[train.labels[left] == label], n, replace=False) for label, n in enumerate(quota)]
    )


def _imbalance(
    train: Entries, left: np.ndarray, classes: list[str] | None, wanted: ImbalanceConfig, seed: int
) -> tuple[np.ndarray, dict]:
    """Cut the rare classes, drawn from their union, to round(the others' images / ratio): the paper's program."""
    if train.labels is None:
        raise UserError("data.imbalance: classes cannot be made rare: the images have no labels")
    rare = _rare_classes(wanted, len(classes), seed)
    if unknown := int((train.labels[left] == UNKNOWN).sum()):
        raise UserError(f"data.imbalance: classes cannot be made rare: {unknown} images have no label")
    is_rare = np.isin(train.labels[left], rare)
    others, union = left[~is_rare], left[is_rare]
    count = min(len(union), round(len(others) / wanted.ratio))
    kept = _generator(seed, "imbalance").choice(union, count, replace=False)
    made = {"classes": rare, "rare_before": len(union), "rare_kept": count, "others": len(others)}
    return np.sort(np.concatenate([others, kept])), made


def _rare_classes(wanted: ImbalanceConfig, number: int, seed: int) -> list[int]:
    if wanted.classes is None:
        if wanted.random_classes >= number:
            raise UserError(f"data.imbalance.random_classes: {wanted.random_classes}, expected 1 to {number - 1}")
        drawn = _generator(seed, "classes").choice(number, wanted.random_classes, replace=False)
        return sorted(int(label) for label in drawn)
    for label in wanted.classes:
        if not 0 <= label < number:
            raise UserError(f"data.imbalance.classes: {label} is no class index, expected 0 to {number - 1}")
    if not 0 < len(set(wanted.classes)) < number:
        raise UserError(f"data.imbalance.classes: {wanted.classes}, expected some of the {number} classes, not all")
    return sorted(set(wanted.classes))
