"""`vitascope presets`: what the denoisers cost, by size."""

from __future__ import annotations

from typing import Annotated

import typer

from vitascope.cli.reporting import print_json

COMMON_PX = 128


def presets(
    json_output: Annotated[bool, typer.Option("--json", help="Print the counts as JSON on stdout.")] = False,
) -> None:
    """Print parameter and operation counts of the denoiser presets.

    Counts are of one call for one clip of 25 frames with sound; a multiply-add is two operations. Guidance doubles it.
    """
    from vitascope.models.factorised.cost import NUM_WORDS, cost_table

    own, common = cost_table(), cost_table(COMMON_PX)
    if json_output:
        print_json({"num_words": NUM_WORDS, "own_size": own, "common_size": common})
        return
    frames, size = own[0].num_frames, f"{COMMON_PX} x {COMMON_PX} px"
    typer.echo(f"One call for one clip of {frames} frames with sound and {NUM_WORDS} words:")
    typer.echo(f"{'preset':8}{'parameters':>16}{'own size':>14}{'tokens':>8}{'GFLOP':>12}{'GFLOP at ' + size:>24}")
    for row, small in zip(own, common, strict=True):
        pixels = f"{row.width_px} x {row.height_px}"
        counts = f"{row.num_parameters:>16,}{pixels:>14}{row.num_tokens:>8,}{row.flops / 1e9:>12,.1f}"
        typer.echo(f"{row.name:8}{counts}{small.flops / 1e9:>24,.1f}")
