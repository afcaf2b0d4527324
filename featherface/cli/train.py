"""``featherface train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from featherface.errors import FeatherFaceError

from . import options


def train(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run: configuration, metrics, checkpoints, weights.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="default, cpu or seed.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration (.toml, .yaml, .json); what it leaves out is as in the preset.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that sources and weights are relative to (data.root).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.option=value, such as optimizer.lr=5e-4. May be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint; begin where there is none.")
    ] = False,
    stop_after: Annotated[
        float | None, typer.Option(min=0, help="Stop with a checkpoint after so many minutes.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration, every option explained, and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a detector, with or without a teacher.

    A run stopped by a signal, a crash or --stop-after goes on with --resume; on the CPU it ends with the same bits as
    one that was never stopped. Several GPUs or machines: torchrun ... -m featherface.training RUN ...
    """
    from featherface.training import Result, dump, from_dict
    from featherface.training import preset as named_preset
    from featherface.training import train as run_training
    from featherface.training.run_folder import RunFolder

    base = named_preset(preset or "default")
    if resume and run is not None and preset is None and config is None and (state := RunFolder.peek(run)) is not None:
        base = from_dict(state["config"])
    chosen = options.configuration(base, config, set_, data)
    if print_config:
        print(dump(chosen), end="")
        return
    if run is None:
        raise FeatherFaceError("name the folder of the run: featherface train RUN (or --print-config)")
    result: Result = run_training(chosen, run, resume, None if stop_after is None else 60 * stop_after, quiet)
    ap = f", validation AP {100 * result.ap['all']:.2f}" if result.ap else ""
    if os.environ.get("RANK", "0") == "0":
        if result.finished:
            print(f"finished: {result.folder / 'final.safetensors'}{ap}")
        else:
            print(f"stopped at step {result.step}, epoch {result.epoch}{ap}; go on with --resume")
    if result.signal:
        raise typer.Exit(128 + result.signal)
