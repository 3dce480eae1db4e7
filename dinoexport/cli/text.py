"""The verbs of text: generate, openai."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import EXIT_CODES, app
from dinoexport.cli.terminal import Json, progress_lines, reporting, say, say_json, say_text

# Several times the longest context, in the widest characters.
_PROMPT_MAX_BYTES = 1 << 23


@app.command(epilog=EXIT_CODES)
def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads it from stdin.")
    ] = None,
    infill: Annotated[
        tuple[str, str] | None, typer.Option(metavar="PREFIX SUFFIX", help="Write the text between the two.")
    ] = None,
    suffix_first: Annotated[
        bool, typer.Option("--suffix-first", help="Put the suffix before the prefix in an infilling prompt.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is the user's turn of a conversation.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system text of the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The largest number of tokens in the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer. Default: a random seed.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeat it for several.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text with a bundle on this machine, and print it token by token."""
    with reporting(as_json):
        from dinoexport.runtime import text_model
        from dinoexport.text import generation, requests

        asked: dict[str, Any] = {
            "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or [],
        }  # fmt: skip
        asked |= _asked(prompt, infill, suffix_first=suffix_first, chat=chat, system=system)
        request = requests.parse(asked)
        with progress_lines() as progress:
            progress(f"opening {bundle}", 0, 0)
            model = text_model.open_bundle(bundle)
            progress(f"opening {bundle}", 1, 1)
        for item in generation.write(model.tokenizer, model.decoder, model.task(request)):
            if isinstance(item, generation.Written):
                _show_end(item, as_json)
            elif not as_json:
                say_text(item)


@app.command(epilog=EXIT_CODES)
def openai(
    model_place: Annotated[
        str, typer.Argument(metavar="URL|BUNDLE", help="A Triton server's http://HOST:8000, or a bundle to open here.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name. Default: the only text model on the server.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.", min=0, max=65535)] = 8080,
    timeout_s: Annotated[float, typer.Option(help="Time limit for each piece of the answer, in seconds.")] = 60.0,
    headers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines `Name: value` to send; a token goes in $DINOEXPORT_TOKEN."),
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates to trust, for https and grpcs.")] = None,
    as_json: Json = False,
) -> None:
    """Serve OpenAI's interface in front of a text model: /v1/completions and /v1/chat/completions."""
    with reporting(as_json):
        from dinoexport.errors import require

        require("openai", "starlette", "uvicorn")
        from dinoexport.serving.openai import app as application
        from dinoexport.serving.openai import sources

        with application.bind(host, port) as bound:
            source = sources.open_source(model_place, model=model, timeout_s=timeout_s, headers=headers, ca=ca)
            place, taken = bound.getsockname()[:2]
            url = f"http://[{place}]:{taken}/v1" if ":" in place else f"http://{host}:{taken}/v1"
            if as_json:
                say_json({"model": source.name, "url": url})
            say(f"Serving {source.name} at {url}   (Ctrl-C ends it)", to_stderr=True)
            application.serve(source, bound)


def _asked(
    prompt: str | None, infill: tuple[str, str] | None, *, suffix_first: bool, chat: bool, system: str | None
) -> dict[str, Any]:
    """The request that the options describe."""
    from dinoexport.errors import UsageError

    if (prompt is None) == (infill is None) or (infill is not None and chat):
        raise UsageError("Give a prompt, or --infill PREFIX SUFFIX.", next_step='dinoexport generate BUNDLE "prompt"')
    if (system is not None and not chat) or (suffix_first and infill is None):
        raise UsageError(
            f"{'--system' if system is not None else '--suffix-first'} has no effect here.",
            next_step="--system belongs to --chat, --suffix-first to --infill.",
        )
    if infill is not None:
        return {"prompt": infill[0], "suffix": infill[1], "suffix_first": suffix_first}
    text = _standard_input() if prompt == "-" else prompt
    if not chat:
        return {"prompt": text}
    begin = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*begin, {"role": "user", "content": text}]}


def _standard_input() -> str:
    """The prompt on stdin; raises UsageError if it is too long or not UTF-8."""
    from dinoexport.errors import UsageError

    raw = b"" if sys.stdin is None else sys.stdin.buffer.read(_PROMPT_MAX_BYTES + 1)
    if len(raw) > _PROMPT_MAX_BYTES:
        raise UsageError(f"stdin has more than {_PROMPT_MAX_BYTES:,} bytes.", next_step="Shorten the prompt.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8 ({error.reason} at byte {error.start}).", next_step="Convert it, as with iconv."
        ) from None


def _show_end(written: Any, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "text": written.text,
                "finish_reason": written.reason,
                "prompt_tokens": written.prompt_tokens,
                "completion_tokens": len(written.ids),
                "token_ids": list(written.ids),
                "first_token_s": round(written.first_s, 4),
                "seconds": round(written.seconds, 4),
            }
        )
        return
    say("")
    rest_s = written.seconds - written.first_s
    speed = f", {(len(written.ids) - 1) / rest_s:.1f} tokens/s" if len(written.ids) > 1 and rest_s > 0 else ""
    reason = {"length": "the limit of tokens", "stop": "the model or a stop text"}[written.reason]
    say(
        f"{written.prompt_tokens} tokens read, {len(written.ids)} written, the first after {written.first_s:.2f} s"
        f"{speed}; {reason}",
        to_stderr=True,
    )
