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
    folder = chosen_run(named, run)
    if watch:
        from fastidmm.interrupt import stoppable
        from fastidmm.progress import say
        from fastidmm.reporting import live

        def tell(url: str) -> None:
            say("until Ctrl-C, for this machine's browsers:")
            answer({"url": url}, as_json, url)

        with stoppable() as stop:
            live.watch(folder, stop, tell)
        return
    from fastidmm.reporting.report import write

    path = str(write(folder))
    answer({"report": path}, as_json, path)
