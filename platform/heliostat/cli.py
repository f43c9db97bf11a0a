"""The command line: one table of commands. Knows flags and output; imports what a command needs when it runs.

stdout carries the result (with --json: one JSON object as its last line), stderr everything else.
Exit codes: 0 done, 2 the input is wrong, 3 a gate refused, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, TextIO

from heliostat import __version__
from heliostat.command import Command, Result, parser_of
from heliostat.command import console as _console
from heliostat.errors import ConfigError, HeliostatError
from heliostat.jobs import commands as job_commands
from heliostat.registry import merge_command, server_command
from heliostat.training import plan_command

if TYPE_CHECKING:
    from pathlib import Path

    from heliostat.experiment import ExperimentConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    if verb not in COMMANDS:
        return _usage(arguments, verb)
    arguments.remove(verb)
    command, parser = COMMANDS[verb], parser_of(verb, COMMANDS[verb])
    if command.passes_on:
        options, rest = parser.parse_known_args(arguments)
        options.rest = rest
    else:
        options = parser.parse_intermixed_args(arguments)
    return _run(command, options)


def _usage(arguments: list[str], verb: str | None) -> int:
    if "--version" in arguments:
        _print(f"heliostat {__version__}", sys.stdout)
        return 0
    table = "\n".join(f"  {name:<14} {command.help}" for name, command in COMMANDS.items())
    _print(
        f"usage: heliostat COMMAND [CONFIG] [key.sub=value ...] [--json]\n\ncommands:\n{table}\n\n"
        "`heliostat COMMAND --help` tells more.",
        sys.stdout,
    )
    if verb is not None:
        print(f"\nerror: there is no command `{verb}`", file=sys.stderr)
    return 0 if verb is None else 2


def _run(command: Command, options: argparse.Namespace) -> int:
    """Run it with everything that libraries print sent to stderr, and turn errors into messages and exit codes."""

    def emit(result: Result) -> None:
        text = json.dumps(result, default=str) if options.json else command.show(result)
        _print(text, stdout)

    stdout, options.emit = sys.stdout, emit
    options.write = lambda text: _print(text, stdout, end="")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = command.run(options)
        if result is not None:
            emit(result)
        return 0
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ctrl-C is a SystemExit without a code while Ray Train runs, and SIGTERM one with its number where Ray does.
        if isinstance(stop, SystemExit) and stop.code == signal.SIGTERM:
            print("terminated", file=sys.stderr)
            return 128 + signal.SIGTERM
        if isinstance(stop, SystemExit) and stop.code:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = error.exit_code if isinstance(error, HeliostatError) else 1
        message = str(error) if isinstance(error, HeliostatError) else f"{type(error).__name__}: {error}"
        if options.debug:
            traceback.print_exc()
        elif not isinstance(error, HeliostatError):
            message += " (--debug shows the traceback)"
        print(f"error: {message}", file=sys.stderr)
        if options.json:
            facts = error.facts if isinstance(error, HeliostatError) else {}
            _print(json.dumps({**facts, "error": message, "exit_code": code}), stdout)
        return code


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print at once. If whoever read our output is gone (`| head`), that and the rest goes nowhere, without a word."""
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _load(options: argparse.Namespace) -> "ExperimentConfig":
    from heliostat import experiment

    return experiment.load(options.config, options.overrides)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the experiment's YAML file")
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings that win over the file's")


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="MODEL|CONFIG",
        help="models:/NAME@ALIAS, a bundle folder, a hub name; or an experiment's YAML",
    )
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings such as serving.port=8001")


def _is_config(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _train(options: argparse.Namespace) -> Result:
    config = _load(options)
    from heliostat.training import trainer

    return asdict(trainer.train(config, _console()))


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder or URI, or its name in the state folder")
    parser.add_argument("--repair", action="store_true", help="set aside checkpoints that are not whole first")


def _resume(options: argparse.Namespace) -> Result:
    from heliostat.training import resume

    return asdict(resume.resume(options.run, _console(), repair=options.repair))


def _show_train(result: Result) -> str:
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    return f"{result['model_uri']}\nbundle {result['bundle']}\nrun {result['run_id']}\n{metrics}"


def _audit(options: argparse.Namespace) -> Result:
    from heliostat.training import auditing

    return auditing.command(_load(options), None if options.json else options.write)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    plan_command.arguments(parser)


def _tune_training(options: argparse.Namespace) -> Result:
    config = _load(options)
    from heliostat.tuning import training_search

    return training_search.tune_training(config, _console())


def _show_tune_training(result: Result) -> str:
    best = "  ".join(f"{key}={value}" for key, value in result["best"].items())
    trained = f"\n{result['trained']['model_uri']}" if result["trained"] else ""
    return f"{result['table']}\nbest: {best}  {result['metric']} {result['value']:.4f}\nrun {result['run_id']}{trained}"


def _tune_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--model", help="whose settings; default: the challenger registered under the config's name")


def _tune_decoding(options: argparse.Namespace) -> Result:
    config = _load(options)
    from heliostat.tuning import decoding_search

    return decoding_search.tune_decoding(config, options.model, _console())


def _show_tune_decoding(result: Result) -> str:
    from heliostat.tuning import decoding_search

    return decoding_search.show(result)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--model", help="what to score; default: the challenger registered under the config's name")
    parser.add_argument(
        "--predictions", metavar="FILE", help="also write prompts, references and predictions as JSON lines"
    )


def _evaluate(options: argparse.Namespace) -> Result:
    config = _load(options)
    from heliostat.registry import scoring

    keys = [override.partition("=")[0] for override in options.overrides]
    given = {key.removeprefix("generation.") for key in keys if key.startswith("generation.")}
    decoding = config.generation.model_dump(include=given)
    return scoring.score(config, options.model, _console(), options.predictions, decoding)


def _show_evaluate(result: Result) -> str:
    from heliostat.registry import scoring

    return scoring.table(result)


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|CONFIG", help="the registered model, or the experiment's YAML file")
    parser.add_argument("--version", help="default: the version with the alias `challenger`")
    parser.add_argument("--config", help="YAML file whose `promotion` section gives the gates of the model NAME")
    parser.add_argument("--metric", help="one more gate: a recorded score that must not be worse than the champion's")
    parser.add_argument("--lower-is-better", action="store_true", help="the metric is a loss")
    parser.add_argument("--tolerance", type=_not_negative, default=0.0, help="how much worse it may be")
    parser.add_argument("--reason", default="", help="kept in the promotion log")


def _not_negative(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def _promote(options: argparse.Namespace) -> Result:
    from heliostat import experiment
    from heliostat.registry import promotion
    from heliostat.registry.config import Gate, PromotionConfig

    path = options.config or (options.name if _is_config(options.name) else None)
    config = experiment.load(path) if path else None
    settings = config.promotion if config else PromotionConfig()
    gates = [*settings.gates, *(Gate(metric=metric) for metric in settings.no_regression)]
    if options.metric is not None:
        mode: Literal["max", "min"] = "min" if options.lower_is_better else "max"
        gates.append(Gate(metric=options.metric, mode=mode, tolerance=options.tolerance))
    return asdict(
        promotion.promote(
            config.registered_model_name if config and _is_config(options.name) else options.name,
            options.version,
            verify=lambda folder: _prove(folder, settings.parity_prompts, config),
            gates=gates,
            reason=options.reason,
            config=path or "CONFIG",
        )
    )


def _prove(folder: "Path", parity_prompts: int, config: "ExperimentConfig | None" = None) -> None:
    """Raise unless the bundle is whole and, where that is asked for, the endpoint's engine decodes it right."""
    from heliostat.models import bundle

    bundle.verify(folder)
    if parity_prompts:
        from heliostat.serving import parity

        args = config.serving if config else None
        parity.check(folder, parity.prompts_for(folder, parity_prompts, config), args)


def _show_promote(result: Result) -> str:
    before = f" (before: version {result['previous']})" if result["previous"] else ""
    return f"models:/{result['name']}@champion is version {result['version']}{before}"


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|CONFIG", help="the registered model, or the experiment's YAML file")
    parser.add_argument("--reason", default="", help="kept in the promotion log")


def _rollback(options: argparse.Namespace) -> Result:
    from heliostat import experiment
    from heliostat.registry import promotion

    name = experiment.load(options.name).registered_model_name if _is_config(options.name) else options.name
    return asdict(promotion.rollback(name, options.reason, verify=lambda folder: _prove(folder, 0)))


def _serve(options: argparse.Namespace) -> None:
    from heliostat import config as configuration
    from heliostat import experiment
    from heliostat.serving.config import ServingConfig

    if _is_config(options.target):
        whole = experiment.load(options.target, options.overrides)
        serving, reference = whole.serving, whole.serving.model or f"models:/{whole.registered_model_name}@champion"
    else:
        overrides = [override.removeprefix("serving.") for override in options.overrides]
        serving, reference = configuration.load(ServingConfig, None, overrides), options.target
    from heliostat import cluster
    from heliostat.serving import launch

    with cluster.connected():
        endpoint = launch.start(serving, reference)
        try:
            options.emit({"url": endpoint.url, "model": endpoint.model_id, "reference": reference})
            _until_interrupted()
        finally:
            endpoint.stop()


def _until_interrupted() -> None:
    """Wait for Ctrl-C or a polite kill; the caller then shuts down what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("press Ctrl-C to stop", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def _show_serve(result: Result) -> str:
    return f"{result['reference']} is served as `{result['model']}` at {result['url']}  (Ctrl-C stops)"


def _keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["add", "revoke", "list"])
    parser.add_argument("file", metavar="FILE", help="the endpoint's serving.api_keys; `add` creates it")
    parser.add_argument("name", metavar="NAME", nargs="?", help="whose key it is")
    parser.add_argument("--model", action="append", dest="models", help="allow this model only; may be repeated")
    parser.add_argument("--requests-per-minute", type=int)
    parser.add_argument("--max-concurrent", type=int, help="requests that may run at once")


def _keys(options: argparse.Namespace) -> Result:
    from heliostat.serving import key_commands

    limits = (options.requests_per_minute, options.max_concurrent)
    return key_commands.run(options.action, options.file, options.name, options.models, *limits)


def _show_keys(result: Result) -> str:
    from heliostat.serving import key_commands

    return key_commands.show(result)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="models:/NAME@ALIAS, a bundle folder or its URI, a GGUF file or a hub name"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="decoding settings: max_new_tokens=32 temperature=0.7"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--file", help="of prompts, one a line; default: stdin, which may be a terminal")
    parser.add_argument(
        "--compare",
        action="append",
        metavar="SETTINGS",
        help="show several ways to decode side by side: greedy, or settings such as 'temperature=0.8 top_k=20'",
    )
    parser.add_argument("--stream", action="store_true", help="write each answer while it comes")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")


def _generate(options: argparse.Namespace) -> Result | None:
    from heliostat.evaluation import generate_command as command

    given = command.settings(options.overrides)
    ways = {text: command.way(text, given) for text in options.compare or ()}
    asked = options.prompt or options.file
    talking = not asked and sys.stdin.isatty()
    if (options.stream or talking) and (ways or options.json):
        raise ConfigError("--compare and --json show whole answers; give --prompt or --file, without --stream")
    prompts = [] if talking else command.read_prompts(options.prompt, options.file, sys.stdin)
    from heliostat.models import base
    from heliostat.registry import versions

    loaded = base.load_for_inference(versions.resolve(options.model).path)
    loaded.check_task("causal_lm", "seq2seq")
    if options.stream or talking:
        command.stream(loaded, _typed() if talking else prompts, given, options.seed, options.write)
        return None
    if ways:
        compared = command.compare(loaded, prompts, ways, options.seed)
        return {"model": options.model, "prompts": prompts, "compared": compared}
    from heliostat.evaluation import completion

    return {"model": options.model, "outputs": completion.complete(loaded, prompts, given, seed=options.seed)}


def _typed() -> Iterator[str]:
    """Prompts as somebody types them, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            if line := input():
                yield line


def _show_generate(result: Result) -> str:
    from heliostat.evaluation import generate_command as command

    if "compared" in result:
        return command.table(result["prompts"], result["compared"], shutil.get_terminal_size((120, 24)).columns)
    return "\n".join(result["outputs"])


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="settings that win over the quickstart's own"
    )
    parser.add_argument("--keep", action="store_true", help="leave the endpoint up until Ctrl-C")


def _quickstart(options: argparse.Namespace) -> Result | None:
    from heliostat.quickstart import run

    def keep(result: Result) -> None:
        options.emit(result)
        _until_interrupted()

    result = run.quickstart(options.overrides, _console(), keep=keep if options.keep else None)
    return None if options.keep else result


def _show_quickstart(result: Result) -> str:
    return f"exact match {result['exact_match']:.3f} in {result['seconds']:.0f} s"


def _doctor(options: argparse.Namespace) -> Result:
    from heliostat import doctor

    return doctor.examine()


def _show_doctor(result: Result) -> str:
    marks = {"ok": "ok  ", "warning": "warn", "problem": "FAIL"}
    return "\n".join(f"{marks[check['status']]} {check['name']:<12} {check['text']}" for check in result["checks"])


def _schema(options: argparse.Namespace) -> Result:
    from heliostat import experiment

    return experiment.schema()


def _nothing(parser: argparse.ArgumentParser) -> None:
    """A command without arguments."""


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "train, evaluate, promote and serve a small model on this machine",
        _quickstart_arguments,
        _quickstart,
        _show_quickstart,
    ),
    "plan": Command(plan_command.HELP, _plan_arguments, plan_command.run, plan_command.show),
    "train": Command("train a model and register it", _config_arguments, _train, _show_train),
    "resume": Command("go on with an unfinished training run", _resume_arguments, _resume, _show_train),
    "audit": Command("show what training would learn", _config_arguments, _audit, lambda _: "fit to be trained on"),
    "tune-training": Command(
        "search values of training keys with Ray Tune", _config_arguments, _tune_training, _show_tune_training
    ),
    "tune-decoding": Command(
        "search decoding settings and prompts for a model",
        _tune_decoding_arguments,
        _tune_decoding,
        _show_tune_decoding,
    ),
    "evaluate": Command("score a model on the test split", _evaluate_arguments, _evaluate, _show_evaluate),
    "promote": Command("make a version champion, if it passes the gates", _promote_arguments, _promote, _show_promote),
    "rollback": Command("make the champion before the champion again", _rollback_arguments, _rollback, _show_promote),
    "serve": Command("serve a model behind an OpenAI-compatible endpoint", _target_arguments, _serve, _show_serve),
    "keys": Command("make, revoke and list the API keys of an endpoint", _keys_arguments, _keys, _show_keys),
    "generate": Command(
        "complete prompts from the command line or stdin", _generate_arguments, _generate, _show_generate
    ),
    "merge": merge_command.COMMAND,
    "doctor": Command("tell what is and is not right on this machine", _nothing, _doctor, _show_doctor),
    "schema": Command(
        "print the JSON schema of the YAML file", _nothing, _schema, lambda schema: json.dumps(schema, indent=2)
    ),
}
COMMANDS |= {**job_commands.table(COMMANDS), "mlflow": server_command.COMMAND}


def entry() -> None:
    """The `heliostat` command."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
