"""Learning curves."""

import io

from matplotlib.figure import Figure

from raypfk import store, strategies


def plot_curves(states: list[dict], path: str, title: str) -> None:
    """Test accuracy over labelled images, one line per run (as `status.read` gives it), written to `path` as PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for state in states:
        rows = [row for row in state["done"] if row["test_accuracy"] is not None]
        by_kernel = strategies.named(state["strategy"]).kind == "kernel"
        name = state["strategy"] + (f", S={state['label_estimator']}" if by_kernel else "")
        axes.plot([r["labelled"] for r in rows], [100 * r["test_accuracy"] for r in rows], marker="o", label=name)
    axes.set(xlabel="labelled images", ylabel="test accuracy, last epoch (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    store.write_bytes(path, buffer.getvalue())
