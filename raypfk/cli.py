"""The command line: parse, build, call.

Exit codes: 0 done, 1 a failure, 2 the user's mistake, 130 interrupted, 143 stopped by SIGTERM.
"""

import json
import os
import shlex
import signal
import sys
import threading
import traceback

import click

from raypfk import __version__
from raypfk.errors import RunError, UserError, WaitingForLabels

_verbose = click.option("--verbose", is_flag=True, help="Ray's own messages, and tracebacks.")
_round = click.option(
    "--round",
    "number",
    type=click.IntRange(min=0),
    required=True,
    help="From 1; round 0 has `train` alone: initial weights.",
)
AGAIN_S = 0.05
"""Until a SIGTERM that Python has lost comes again: longer than it takes to destroy an object."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="raypfk")
def cli():
    """Active learning for biased image pools by Fisher-kernel self-supervision, on Ray."""


@cli.command()
@click.argument("config_argument", metavar="[CONFIG]", required=False, type=click.Path())
@click.option("--config", "config_option", type=click.Path(), help="The same, as an option.")
@click.option("--out", required=True, help="Run directory: a local path or s3://bucket/key.")
@click.option("--strategy", help="One of docs/strategies.md, or package.module:function.")
@click.option("--label-estimator", help="What stands in for unknown labels: one of docs/strategies.md.")
@click.option("--rounds", type=int, help="Rounds of selection.")
@click.option("--seed", type=int, help="Seed of split, imbalance, weights, centers and training.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any field, as in train.epochs=20.")
@_verbose
def run(config_argument, config_option, out, assignments, verbose, **overrides):
    """Run CONFIG, a YAML file, to its last round; run again, it goes on where it stopped."""
    from raypfk import config as configs
    from raypfk import loop, session, status

    if bool(config_argument) == bool(config_option):
        raise click.UsageError("expected one configuration: raypfk run CONFIG.yaml --out DIR")
    config = configs.load(config_argument or config_option, overrides, configs.assigned(assignments))
    with session.ray_session(verbose):
        loop.run(config, out, _command_line())
    status.show(status.with_trust(status.read(out)))


@cli.command()
@click.argument("path", metavar="EXPERIMENT", type=click.Path())
@click.option("--out", required=True, help="The experiment's directory: a local path or s3://bucket/key.")
@click.option("--cell", "only", multiple=True, help="Only these cells; may be given several times.")
@click.option("--seeds", help="These seeds in place of the file's: 0,1,2; runs of others stay.")
@click.option(
    "--parallel", type=click.IntRange(min=1), help="Runs at a time.  [default: the file's, or one per GPU, or core]"
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any field of all runs.")
@_verbose
def experiment(path, out, only, seeds, parallel, assignments, verbose):
    """Run EXPERIMENT, a YAML file of cells and seeds, side by side; run again, it goes on where it stopped."""
    from raypfk import config as configs
    from raypfk import experiment as experiments
    from raypfk import session, study

    planned = experiments.load(path, configs.assigned(assignments), only, seeds)
    parallel = parallel or planned.parallel
    with session.ray_session(verbose, cpus=experiments.CPUS * (parallel or session.cores())):
        experiments.run(planned, out, parallel, _command_line())
    study.show(study.open_study(out))


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, help="Folder for the pool, two runs and the plot.")
@_verbose
def demo(out, verbose):
    """Bundled digits with a 10x class imbalance: pfk against random, a table and a plot at the end."""
    from raypfk import demo as demonstration
    from raypfk import session

    with session.ray_session(verbose):
        demonstration.demo(out, _command_line())


@cli.command("status")
@click.argument("run_dir", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def status_command(run_dir, as_json):
    """What is done of RUN, round by round."""
    from raypfk import status

    state = status.with_trust(status.read(run_dir))
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        status.show(state)


@cli.command("verify")
@click.argument("uri", metavar="RUN|POOL")
def verify_command(uri):
    """Count RUN or POOL again from its files and say what is wrong (exit code 1), or that nothing is."""
    from raypfk import verify

    problems = verify.verify(uri)
    for problem in problems:
        click.echo(problem)
    click.echo(f"{uri}: {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}", err=True)
    return 1 if problems else 0


@cli.command("report")
@click.argument("uri", metavar="RUN|EXPERIMENT")
@click.option("--out", help="Folder of the page.  [default: RUN|EXPERIMENT/report]")
def report_command(uri, out):
    """A page on RUN or EXPERIMENT: curves, significance, what was selected and why. Opens from disk."""
    from raypfk.report import report

    click.echo(report.write(uri, out, _command_line()))


@cli.group()
def pool():
    """Pools of images."""


@pool.command("build")
@click.argument("source")
@click.argument("dest")
@click.option("--validation", help="Images (500), share (0.1) or folder of class folders: the trusted validation set.")
@click.option("--test", help="Likewise, the test set.")
@click.option("--imbalance", type=float, help="Cut the --rare classes to the others' images / IMBALANCE.")
@click.option("--rare", help="Rare classes by index, in the order of their names: 5,6,7.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--shard-rows", type=click.IntRange(min=1), default=1024, show_default=True, help="Images per shard.")
@click.option(
    "--max-rejects", help="Images, or share of them, that may be rejected before it stops.  [default: 0.1; always 10]"
)
@click.option("--labels", help="CSV or Parquet file with image_id and label, in place of the source's own labels.")
@click.option("--by-reference", is_flag=True, help="Keep where the images lie; fetch them when they are needed.")
@click.option("--image-column", help="parquet: the encoded images.  [default: image]")
@click.option("--uri-column", help="manifest: paths or URIs.  [default: uri]")
@click.option("--id-column", help="parquet, manifest: the images' ids.")
@click.option("--label-column", help="parquet, manifest: class names or indices.  [default: label, if there]")
@_verbose
def build(source, dest, seed, verbose, image_column, uri_column, id_column, label_column, **options):
    """Make the pool DEST of SOURCE: a folder of images, webdataset:TARS, parquet:FILES, manifest:LIST.csv (each of
    them local or s3://), ilsvrc:ROOT (s3:// too), or mnist:ROOT, svhn:ROOT, cifar10:ROOT, digits. Of a pool that is
    there: what SOURCE has got since is added."""
    from raypfk import pool_command, session

    columns = {"image": image_column, "uri": uri_column, "id": id_column, "label": label_column}
    data = pool_command.data_config(source, columns=columns, **options)
    with session.ray_session(verbose):
        pool_command.build(data, dest, seed)


def _stage_command(name: str, text: str) -> click.Command:
    @click.command(name, help=text)
    @click.argument("run_dir", metavar="RUN")
    @_round
    @_verbose
    def command(run_dir, number, verbose):
        from raypfk import loop, progress, session
        from raypfk.run import Run

        opened = Run.open(run_dir)
        with session.ray_session(verbose):
            if not loop.do_stage(opened, number, name):
                progress.current().say(f"round {number}: {name} is done already")

    return command


extract = _stage_command("extract", "Features and Fisher scores of the validation set and the pool.")
score = _stage_command("score", "The kernel: the best pool images for each center.")
acquire = _stage_command("acquire", "The images most worth labelling.")
label = _stage_command("label", "Their labels, from the oracle.")
train = _stage_command("train", "Retrain on all labels so far (round 0: make the initial weights).")
evaluate = _stage_command("evaluate", "Accuracy on the test set.")
for _command in (extract, score, acquire, label, train, evaluate):
    cli.add_command(_command)


def run_command(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command as the program: one clear message on stderr and an exit code, whatever happens."""
    verbose = "--verbose" in (sys.argv if args is None else args)
    sys.path.append(os.getcwd())  # `strategy: mine:surprised` is in mine.py here, whatever the program lies in
    terminated = _hear_sigterm()
    try:
        code = command.main(args, standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        how, code = ("stopped by SIGTERM", 143) if terminated.is_set() else ("interrupted", 130)
        _stop(f"{how}; the same command goes on from here", code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except WaitingForLabels as waiting:
        click.echo(str(waiting), err=True)
        sys.exit(0)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        mistake = _find(error, UserError)
        if mistake:
            _stop(str(mistake), 2)
        # Ours, or the system's, names the file; what it was raised from is a library's word for it.
        cause = _find(error, RunError) or _find(error, OSError) or list(_chain(error))[-1]
        _stop(f"failed: {type(cause).__name__}: {cause}" + ("" if verbose else "\n(--verbose shows where)"), 1)
    sys.exit(code if isinstance(code, int) else 0)


def main() -> None:
    run_command(cli)


def _command_line() -> str:
    """As it would be typed: a job's script stands for the command."""
    name, args = click.get_current_context().command.name, sys.argv[1:]
    return shlex.join(["raypfk", *([] if args[:1] == [name] else [name]), *args])


def _hear_sigterm() -> threading.Event:
    """From now on SIGTERM ends the program as Ctrl-C does; the event says that it was SIGTERM.

    Ray passes on KeyboardInterrupt alone of what a handler raises while it waits, and makes a new one of it.
    """
    terminated, main, otherwise = threading.Event(), threading.main_thread(), sys.unraisablehook

    def stop(*_) -> None:
        if not terminated.is_set():  # one is enough: a second would break the ending
            terminated.set()
            raise KeyboardInterrupt

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        """What is raised while an object is destroyed goes nowhere: the signal comes again when that is over."""
        if not (terminated.is_set() and lost.exc_type is KeyboardInterrupt):
            otherwise(lost)
            return
        terminated.clear()
        threading.Timer(AGAIN_S, signal.pthread_kill, (main.ident, signal.SIGTERM)).start()

    if threading.current_thread() is main:
        signal.signal(signal.SIGTERM, stop)
        sys.unraisablehook = unraisable
    return terminated


def _stop(message: str, code: int) -> None:
    click.echo(f"raypfk: {message}", err=True)
    sys.exit(code)


def _chain(error: BaseException | None):
    """The error, and what it was raised from: Ray wraps what a task raised, and Ray Train what its workers raised."""
    while error is not None:
        yield error
        inside = list(getattr(error, "worker_failures", {}).values())
        inside += [getattr(error, name, None) for name in ("_base_exc", "controller_failure", "cause", "__cause__")]
        error = next((e for e in inside if e is not None), None)


def _find(error: BaseException, kind: type) -> BaseException | None:
    """The first of this kind. What Ray makes of a task's error is of its kind too, but says a whole traceback."""
    from ray.exceptions import RayError

    return next((e for e in _chain(error) if isinstance(e, kind) and not isinstance(e, RayError)), None)


if __name__ == "__main__":
    main()
