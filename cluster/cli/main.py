"""The command line, `rlhf`: it reads arguments, calls one function a command and gives its exit code.

It knows typer; everything heavier is imported by the command that needs it, so that `--help` answers at once.
Exit codes: 0 done, 1 failed, 2 bad input or config, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trainers.errors import Problem, UserError


class _Group(TyperGroup):
    """Prints user errors as a list, without a traceback, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print_problems(error.problems)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="rlhf",
    cls=_Group,
    help="Online RLHF on a Ray cluster: vLLM generates, a reward service scores, DeepSpeed trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time of --help
)
data_app = typer.Typer(no_args_is_help=True, help="Check prompts files.")
runs_app = typer.Typer(no_args_is_help=True, help="List, show and stop runs.")
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", show_default=False, help="The run's config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False, help="Config values to change.")
]
_OWN_PROCESS = "own process"  # of the console script: what it imports is for its command alone
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Root = Annotated[Path, typer.Option(help="Folder that contains the runs.")]


def print_problems(problems: tuple[Problem, ...]) -> None:
    """Each problem as one line on standard error."""
    for problem in problems:
        typer.echo(f"{problem.where}: {problem.message}", err=True)
    typer.echo(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found", err=True)


def _import_no_models(context: typer.Context) -> None:
    """For a command that only tokenizes: transformers without torch, unless others use this process too."""
    if context.obj == _OWN_PROCESS:
        from trainers.data.tokenizers_only import import_tokenizers

        import_tokenizers()


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(table: Any) -> None:
    from rich.console import Console

    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=160)).print(table)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rlhf {version('rlhf-online')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|DIR", help="Resume the newest fitting run, none, or the run in DIR.")
    ] = "auto",
) -> None:
    """Train, or resume: on the cluster at RAY_ADDRESS, else on this machine."""
    began = monotonic()
    from cluster.config.run import load_config

    run = load_config(config, overrides or [])  # before anything heavy: most mistakes are seen here
    from cluster.training.preloading import preloaded_python

    with preloaded_python() as python:
        _import_no_models(context)
        from cluster.models.remote import as_resumed
        from cluster.planning.plan import find_problems

        problems = find_problems(as_resumed(run, resume))
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            where = f"no such folder: {resume}; give auto, never or a run's directory"
            problems = [Problem("--resume", where), *problems]
        if problems:
            raise UserError(problems)
        checked = monotonic()
        from cluster.training import launch

        spent = {"check the config": checked - began, "import": monotonic() - checked}
        raise typer.Exit(launch.train(run, resume=resume, spent=spent, python=python).exit_code)


@app.command()
def plan(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        bool | None,
        typer.Option("--gpus/--cpus", show_default=False, help="Plan for GPUs or CPUs; by default as on this machine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a run without starting it: full config, batches, roles, memory, every problem. Needs no GPU."""
    from cluster.config.run import load_config, problems_as_json

    try:
        run = load_config(config, overrides or [])
    except UserError as error:
        if as_json:
            _print_json({"problems": problems_as_json(error.problems)})
        raise
    _import_no_models(context)
    from cluster.planning.plan import as_json as plan_as_json
    from cluster.planning.plan import make_plan, render

    made = make_plan(run, gpus=gpus)
    if as_json:
        _print_json(plan_as_json(made))
    else:
        _print_table(render(made))
    if made.problems:
        raise typer.Exit(2)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a trained model or of a PEFT adapter.")],
    base: Annotated[str | None, typer.Option(help="A second model that replies too.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Reply to this prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 = always the most probable token.")] = 1.0,
) -> None:
    """Chat with a trained model, beside its base."""
    from cluster.models.chat import ChatOptions, run_chat

    options = ChatOptions(max_tokens=max_tokens, temperature=temperature, system=system)
    raise typer.Exit(run_chat(model, base=base, prompt=prompt, options=options))


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", show_default=False, help="The run's directory, its id, or a unique prefix of it."
        ),
    ],
    merged: Annotated[
        Path, typer.Option(metavar="FOLDER", show_default=False, help="Where to write: a new or empty folder.")
    ],
    root: Root = Path("runs"),
) -> None:
    """Merge a run's adapter (lora, qlora, adalora) into its base, as one full model, and report the rounding error."""
    from cluster.models.export import describe, export_merged
    from cluster.runs.summary import find_run

    path = Path(run) if (Path(run) / "run.json").is_file() else find_run(root, run).path
    typer.echo(describe(export_merged(path, merged), merged))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; all but loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free port.")] = 8080,
    root: Root = Path("runs"),
    models: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Folder or s3://… to find models in. Repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Folder from which configs may name prompts. Repeatable.")
    ] = None,
    reward_files: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder whose .py files may be reward functions. Repeatable."),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help="IP or network of a reverse proxy whose X-Forwarded-For is trusted. Repeatable."
        ),
    ] = None,
    max_concurrent_runs: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Runs at a time; default: as many as fit, 1 on CPUs.")
    ] = None,
    max_upload_gb: Annotated[float, typer.Option(min=0.001, help="Largest upload, in 10^9 bytes.")] = 10,
    max_uploads_gb: Annotated[float, typer.Option(min=0.001, help="All uploads together, in 10^9 bytes.")] = 100,
    new_token: Annotated[bool, typer.Option("--new-token", help="Print a new bearer token and exit.")] = False,
) -> None:
    """Serve the web page and the HTTP API; runs continue when it ends."""
    from cluster.service import serve as service

    if new_token:
        typer.echo(service.new_token(root))
        return
    service.run_service(
        service.ServeOptions(
            host=host,
            port=port,
            root=root,
            models=tuple(models or ()),
            data=tuple(data or ()),
            reward_files=tuple(reward_files or ()),
            proxies=tuple(proxy or ()),
            max_concurrent_runs=max_concurrent_runs,
            max_upload_gb=max_upload_gb,
            max_uploads_gb=max_uploads_gb,
        )
    )


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", show_default=False, help="Address of Ray's dashboard; default RAY_ADDRESS."),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show the run's output until it ends; exit with its code.")] = False,
) -> None:
    """Start a run on a cluster through the Ray Jobs API; the cluster must be able to read its files."""
    from cluster.config.run import load_config
    from cluster.jobs.submit import submit as submit_run

    raise typer.Exit(submit_run(load_config(config, overrides or []), address=address, follow=follow))


@app.command()
def demo(
    root: Root = Path("runs"),
    prepare: Annotated[bool, typer.Option("--prepare", help="Only create the models and prompts.")] = False,
) -> None:
    """Create a tiny policy and reward model and train with them: minutes on two cores."""
    from cluster.cli.demo import run_demo

    raise typer.Exit(run_demo(root, prepare_only=prepare))


@data_app.command("check")
def data_check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", show_default=False, help="Prompts files; - is standard input.")
    ],
    model: Annotated[str | None, typer.Option(help="Tokenize with this model: lengths, chat template.")] = None,
    strip_responses: Annotated[bool, typer.Option(help="Accept files with responses; use their prompts only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Report the format of prompts files and every problem by line. Exits with 0 if all are ready."""
    from cluster.cli.data_check import data_check as check

    raise typer.Exit(check(files, model=model, strip_responses=strip_responses, as_json=as_json))


@runs_app.command("list")
def runs_list(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs."""
    from cluster.runs.summary import list_runs

    runs = list_runs(root)
    if as_json:
        _print_json({"runs": [run.as_json() for run in runs]})
        return
    from cluster.cli.runs import runs_table

    _print_table(runs_table(runs) if runs else f"no runs in {root} yet")


@runs_app.command("show")
def runs_show(
    run_id: Annotated[
        str, typer.Argument(metavar="ID", show_default=False, help="The run's id, or a unique prefix of it.")
    ],
    root: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show a run: state, last metrics, checkpoints, its error."""
    from cluster.runs.summary import details, find_run

    found = details(find_run(root, run_id))
    if as_json:
        _print_json(found.as_json())
        return
    from cluster.cli.runs import run_table

    _print_table(run_table(found))


@runs_app.command("stop")
def runs_stop(
    run_id: Annotated[
        str, typer.Argument(metavar="ID", show_default=False, help="The run's id, or a unique prefix of it.")
    ],
    root: Root = Path("runs"),
) -> None:
    """Stop a run, whoever started it; it saves a checkpoint first."""
    from cluster.jobs.submit import stop

    typer.echo(stop(root, run_id))


def main() -> None:
    """The console script."""
    app(obj=_OWN_PROCESS)
