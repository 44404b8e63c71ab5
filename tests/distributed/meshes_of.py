"""The meshes of a layout, made once in a process, as a run makes them: torch then remembers how it cuts operations."""

import functools

from scatterfold.parallel import Layout, Process
from scatterfold.parallel.layout import ResolvedLayout
from scatterfold.parallel.meshes import Meshes


def meshes_of(layout: Layout, process: Process) -> Meshes:
    return _made(layout.resolve(process.world))


@functools.cache
def _made(layout: ResolvedLayout) -> Meshes:
    return layout.meshes("cpu")
