"""The command `fastidmm report`: a run as one page, written or shown while the run goes on."""

from typing import Annotated

import typer

from fastidmm.options import JsonOption, RunArgument, RunOption, answer, chosen_run


def report(
    named: RunArgument = None,
    run: RunOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it to this machine's browsers, live.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's report.html, or show it while the run goes on.

    Example: fastidmm report --run demo
    """
    folder = chosen_run(named or run)
    if watch:
        from fastidmm.interrupt import stoppable
        from fastidmm.reporting import live

        with stoppable() as stop:
            live.watch(folder, stop, lambda url: answer({"url": url}, as_json, url))
        return
    from fastidmm.reporting.report import write

    path = str(write(folder))
    answer({"report": path}, as_json, path)
