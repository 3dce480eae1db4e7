"""Decoders beside their peers: a step after 1024 tokens, and a prompt of 512: `make bench-text`.

Every candidate has the same GGUF file, a process of its own and a turn in each round; each figure is the median of the
rounds. The peers' packages are in an environment of their own (`--peers PYTHON`). A candidate that cannot be opened is
a row with the reason. Writes benchmarks/results/text.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAST, PROMPT, STEPS = 1024, 512, 24
PRECISIONS = ("fp32", "int8", "int4")
PROBE_BYTES = 1 << 29
# Everyone gets all CPUs of the system; onnxruntime-genai took one of two by default.
THREADS = os.cpu_count() or 1
Figures = dict[str, float]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def prompt_ids() -> list[int]:
    """1200 tokens of Python, the longest case of the validation."""
    (ids,) = json.loads((ROOT / "validate" / "smollm2_long.json").read_text())
    return list(ids)


def of_bundle(place: str) -> Figures:
    """RUNTIME:BUNDLE, through the runtime's decoder. bytes: of the weights that a step reads, and of its cache."""
    import numpy as np

    from dinoexport import bundle
    from dinoexport.runtime import cpu, decoding
    from dinoexport.spec import Runtime, Way

    runtime, _, folder = place.partition(":")
    manifest = bundle.read_manifest(Path(folder))
    (facts,) = manifest.graphs
    graph, path = facts.graph(), Path(folder) / facts.file
    way = Way(runtime=Runtime(runtime), precision=manifest.precision, threads=THREADS)
    opened = cpu.open_graphs({path: graph}, way)[graph.name]
    ids = np.array([prompt_ids()])

    def read(count: int) -> Any:
        decoder = decoding.begin(opened, graph)
        decoder.step(ids[:, :count], np.ones((1, count), np.int64))
        return decoder

    read(PROMPT)
    prefill = timed(lambda: read(PROMPT))
    decoder = read(PAST)
    steps = [
        timed(lambda at=at: decoder.step(ids[:, at : at + 1], np.ones((1, at + 1), np.int64)))
        for at in range(PAST, PAST + STEPS)
    ]
    cache = sum(a.nbytes for a in decoder.carried().values())
    table = 4 * manifest.recipe["model"]["vocabulary"] * manifest.recipe["model"]["dim"]
    stored = path.with_name(f"{path.name}.data").stat().st_size - table  # of which a step reads one row
    return {"prefill_ms": prefill, "step_ms": statistics.median(steps), "bytes": stored + cache}


def of_transformers(place: str) -> Figures:
    """A folder of Hugging Face's, in fp32 and eager."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    ids = torch.tensor([prompt_ids()])
    with torch.inference_mode():
        model(ids[:, :PROMPT], logits_to_keep=1)
        prefill = timed(lambda: model(ids[:, :PROMPT], logits_to_keep=1))
        cache = model(ids[:, :PAST], logits_to_keep=1, use_cache=True).past_key_values
        steps = [
            timed(lambda at=at: model(ids[:, at : at + 1], past_key_values=cache, use_cache=True))
            for at in range(PAST, PAST + STEPS)
        ]
    return {"prefill_ms": prefill, "step_ms": statistics.median(steps)}


def of_onnxruntime_genai(place: str) -> Figures:
    """A folder of its builder's."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(place)
    options = {"intra_op_num_threads": THREADS}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=PAST + STEPS + 8, do_sample=False, min_length=PAST + STEPS + 8)

    def read(count: int) -> Any:
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(prompt_ids()[:count])
        return generator

    read(PROMPT)
    prefill = timed(lambda: read(PROMPT))
    generator = read(PAST)
    generator.generate_next_token()
    steps = [timed(generator.generate_next_token) for _ in range(STEPS)]
    return {"prefill_ms": prefill, "step_ms": statistics.median(steps)}


def of_openvino_genai(place: str) -> Figures:
    """A GGUF file, which it reads itself; its own figures of the time to the first token and for each further one."""
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(place, "CPU", INFERENCE_NUM_THREADS=THREADS)
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.apply_chat_template, config.ignore_eos = False, False, True

    def ask(count: int, tokens: int, begin: int) -> Any:
        """begin: another one each time, because the pipeline keeps the cache of a prompt that it has read."""
        import numpy as np

        config.max_new_tokens = tokens
        ids = np.array([prompt_ids()[begin : begin + count]])
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return pipeline.generate(inputs, config).perf_metrics

    ask(PROMPT, 1, 2)
    prefill = ask(PROMPT, 1, 1).get_ttft().mean
    return {"prefill_ms": prefill, "step_ms": ask(PAST, STEPS, 0).get_tpot().mean}


def of_llama_cpp(place: str) -> Figures:
    """A GGUF file, by llama.cpp's server in this process; its own figures."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = place, 2 * PAST, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)

    def ask(count: int, tokens: int) -> Any:
        wanted = {"n_predict": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        return server.handle_completions({"prompt": prompt_ids()[:count], **wanted})["timings"]

    ask(PROMPT, 1)
    return {"prefill_ms": ask(PROMPT, 1)["prompt_ms"], "step_ms": ask(PAST, STEPS + 1)["predicted_per_token_ms"]}


KINDS: dict[str, Callable[[str], Figures]] = {
    "dinoexport": of_bundle,
    "transformers": of_transformers,
    "onnxruntime-genai": of_onnxruntime_genai,
    "openvino-genai": of_openvino_genai,
    "llama.cpp": of_llama_cpp,
}


def prepare_peers(gguf: Path, work: Path) -> None:
    """The files that two of the peers read, in their own Python: Hugging Face's folder, and genai's int4 of it."""
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    del read.config.quantization_config  # or transformers refuses to save it, although the numbers are fp32
    model = transformers.AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(work / "hf")
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work / "hf")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    subprocess.run([*builder, "-i", work / "hf", "-o", work / "genai-int4", "-c", work / "cache"], check=True)


def prepare(gguf: Path, work: Path, peers: str) -> list[str]:
    """Makes what is not there yet. Returns the candidates, as LABEL=KIND=PLACE."""
    work.mkdir(parents=True, exist_ok=True)
    for precision in PRECISIONS:
        if not (work / precision / "manifest.json").exists():
            build = ["-m", "dinoexport", "build", "smollm2-135m", "--weights", gguf, "--precision", precision]
            subprocess.run([sys.executable, *build, "--target", "cpu", "--out", work / precision], check=True)
    if not (work / "genai-int4" / "genai_config.json").exists():
        subprocess.run([peers, "-m", "benchmarks.text", gguf, "--work", work, "--prepare"], cwd=ROOT, check=True)
    ours = [
        f"dinoexport {precision}, {title}=dinoexport={runtime}:{work / precision}"
        for precision in PRECISIONS
        for runtime, title in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
    ]
    return [
        *ours,
        f"onnxruntime-genai int4=onnxruntime-genai={work / 'genai-int4'}",
        f"llama.cpp, the GGUF file=llama.cpp={gguf}",
        f"OpenVINO GenAI, the GGUF file=openvino-genai={gguf}",
        f"transformers fp32=transformers={work / 'hf'}",
    ]


def memory_gb_per_s() -> float:
    """The best rate at which two threads sum half a gigabyte."""
    import numpy as np

    halves = np.ones((2, PROBE_BYTES // 8), np.float32)
    with ThreadPoolExecutor(2) as pool:
        return PROBE_BYTES / 1e6 / min(timed(lambda: list(pool.map(np.sum, halves))) for _ in range(10))


def figures_of(candidate: str, peers: str) -> Figures | str:
    """One turn of a candidate in a process of its own, or the reason why there is none."""
    python = sys.executable if candidate.split("=")[1] == "dinoexport" else peers
    command = [python, "-m", "benchmarks.text", candidate, "--one"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        return (ran.stderr.strip().splitlines() or ["it ended"])[-1][:100]
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


def row(label: str, rounds: list[Figures | str], memory: float) -> str:
    """The candidate's line of the table. memory: GB/s."""
    found = [figures for figures in rounds if not isinstance(figures, str)]
    if not found:
        return f"| {label} | {rounds[0]} | | | | |"
    step, prefill = (statistics.median(figures[key] for figures in found) for key in ("step_ms", "prefill_ms"))
    share = f"{found[0]['bytes'] / 1e6 / step / memory:.0%}" if "bytes" in found[0] else ""
    return f"| {label} | {step:.1f} | {1000 / step:.0f} | {share} | {prefill:.0f} | {1000 * PROMPT / prefill:.0f} |"


def main() -> None:
    """Prepares, asks every candidate in turn, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", help="The model that everyone reads.")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-text", help="Where bundles are kept.")
    parser.add_argument("--peers", default=sys.executable, help="The Python that has the peers' packages.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="What else the machine did.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "text.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        _, kind, place = asked.gguf.split("=", 2)
        print(json.dumps(KINDS[kind](place)))
        return
    gguf, work = Path(asked.gguf).absolute(), asked.work.absolute()
    if asked.prepare:
        prepare_peers(gguf, work)
        return
    from dinoexport.runtime import cpu

    candidates = prepare(gguf, work, asked.peers)
    rounds: dict[str, list[Figures | str]] = {candidate: [] for candidate in candidates}
    memory = memory_gb_per_s()
    for _ in range(asked.rounds):
        for candidate in candidates:
            rounds[candidate].append(figures_of(candidate, asked.peers))
        memory = max(memory, memory_gb_per_s())
    lines = [
        "# Decoders beside their peers",
        "",
        f"`make bench-text`, SmolLM2-135M on {cpu.machine()}, {THREADS} CPUs, as many threads for each, "
        f"{asked.rounds} rounds in turn, medians. Memory: {memory:.0f} GB/s. {asked.note}".strip(),
        "",
        f"| candidate | step after {PAST}, ms | tokens/s | of memory speed | prompt of {PROMPT}, ms | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row(candidate.split("=")[0], rounds[candidate], memory) for candidate in candidates),
    ]
    asked.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
