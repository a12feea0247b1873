"""Our native engine against ONNX Runtime, OpenVINO and torch: the same networks, one machine.

    python benchmarks/engines.py                      LeNet and ResNet-20, 1 and 2 threads
    python benchmarks/engines.py --isa avx512vnni     ours and oneDNN without AMX

From Python, from a float32 array to a float32 array. Ours is `program.run(x, engine="native")`;
every peer is called in the way that it likes best (`peers.py`). All contenders of a line run in one
process in turns, many short segments each; a figure is the median over the rounds, with quartiles.
Threads and the cap of the instruction set are fixed for a process, so each has one of its own.

Before it is timed, a peer that runs our file must give our logits to the bit, and any other logits
that correlate with the float network's by 0.99 or more; a way to call it that does not, and a peer
that is not installed, is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from networks import Floats, Subject, subject
from peak import peaks

import intact
from intact import machine
from intact.bench import seconds
from intact.engines.native import NativeEngine
from intact.errors import IntactError
from intact.export.onnx import FLAVOURS
from intact.export.onnx import model as onnx_model
from intact.program import Program
from intact.timing import interleave

NETWORKS = {"lenet": 256, "resnet20": 64}
"""Name -> samples of a large batch."""
OURS, CODES = "intact", "intact, codes"
CORRELATION = 0.99
INSTRUCTION = {"amx": "tdpbssd", "avx512vbmi": "vpdpbusd", "avx512vnni": "vpdpbusd"}
"""The multiplication of an instruction set whose peak is known."""
VNNI_CAP = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}

Result = dict[str, Any]


# -- one process ---------------------------------------------------------------------------------


def measure(subject: Subject, batch: int, threads: int, isa: str, rounds: int) -> Result:
    """All contenders on one network, batch size and number of threads."""
    x = np.ascontiguousarray(subject.images[:batch])
    contenders, left_out = _contenders(subject, x, threads, isa)
    timings = interleave(
        contenders,
        rounds=rounds,
        segment=0.015,
        # Worker threads of a peer may spin for tens of milliseconds after a call.
        pause=0.1 if threads > 1 else 0.0,
        budget=6.0,
    )
    return {
        "network": subject.name,
        "batch": batch,
        "threads": threads,
        "isa": NativeEngine(subject.program, isa=isa, threads=threads).isa,
        "macs": sum(map(subject.program.macs, subject.program.ops)),
        "seconds": {name: [t.median, t.low, t.high] for name, t in timings.items()},
        "left_out": left_out,
    }


def _contenders(
    subject: Subject, x: Floats, threads: int, isa: str
) -> tuple[dict[str, peers.Call], dict[str, str]]:
    program = subject.program
    codes = program.quantize_input(x)
    ours: dict[str, peers.Call] = {}
    if isa == "auto":
        ours[OURS] = lambda: program.run(x, engine="native", threads=threads)
        ours[CODES] = lambda: program.codes(codes, engine="native", threads=threads)
    else:  # the public call takes the best instruction set: this is what it calls
        engine = NativeEngine(program, isa=isa, threads=threads)
        ours[OURS] = lambda: engine.run(x)
        ours[CODES] = lambda: engine(codes)
    expected = program.run(x, engine="torch")
    if not np.array_equal(ours[OURS](), expected):
        raise IntactError(f"the native engine is wrong on {subject.name}: nothing is timed.")
    with torch.inference_mode():
        reference = subject.network(torch.from_numpy(x)).numpy()
    floating = peers.float_onnx(subject.network)
    own = peers.quantize_static(floating, subject.calibration, signed=False)
    makers: dict[str, Callable[[], peers.Ways]] = {
        "ONNX Runtime int8 (our file)": lambda: {
            f"{flavour}, {way}": call
            for flavour in FLAVOURS
            for way, call in peers.onnxruntime_peer(
                onnx_model(program, flavour=flavour), x, threads
            ).items()
        },
        "ONNX Runtime int8 (its own)": lambda: peers.onnxruntime_peer(own, x, threads),
        "ONNX Runtime float32": lambda: peers.onnxruntime_peer(floating, x, threads),
        "OpenVINO int8 (our file)": lambda: {
            f"{flavour}, {way}": call
            for flavour in FLAVOURS
            if flavour != "qoperator"  # which OpenVINO does not read
            for way, call in peers.openvino_peer(
                onnx_model(program, flavour=flavour), x, threads
            ).items()
        },
        "OpenVINO int8 (free scales)": lambda: peers.openvino_peer(own, x, threads),
        "OpenVINO bf16": lambda: peers.openvino_peer(floating, x, threads, "bf16"),
        "OpenVINO float32": lambda: peers.openvino_peer(floating, x, threads),
        "torch float32": lambda: peers.torch_peer(subject.model, x),
        "torch float32, compiled": lambda: peers.torch_compiled_peer(subject.model, x),
    }
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            ways = make()
            results = {way: call() for way, call in ways.items()}
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way that it likes
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        exact = expected if "our file" in name else None
        wrong = {way: _wrong(result, exact, reference) for way, result in results.items()}
        left_out |= {f"{name} ({way})": reason for way, reason in wrong.items() if reason}
        right = {way: call for way, call in ways.items() if not wrong[way]}
        if right:
            ours[name] = right[peers.fastest(right)]
    return ours, left_out


def _wrong(result: Floats, exact: Floats | None, reference: Floats) -> str | None:
    """What is wrong with a peer's logits, or None."""
    if exact is not None:
        different = int((result != exact).sum())
        return (
            f"{different} of {exact.size} logits differ from the program's" if different else None
        )
    if not np.ptp(result):
        return "its logits are all the same"
    correlation = float(np.corrcoef(result.ravel(), reference.ravel())[0, 1])
    if correlation < CORRELATION:
        return f"its logits correlate with the float network's by {correlation:.3f} only"
    return None


def build_facts(subject: Subject, isa: str) -> Result:
    """Seconds of compiling, seconds of a cached start, and sizes in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.safetensors"
        subject.program.save(path)
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        script = (
            "import json, sys, time\n"
            "import numpy as np\n"
            "from intact.engines.native import NativeEngine\n"
            "from intact.storage import load\n"
            "start = time.perf_counter()\n"
            "program = load(sys.argv[1])\n"
            "engine = NativeEngine(program, isa=sys.argv[2], threads=1)\n"
            "engine.run(np.zeros((1, *program.tensors[program.input].shape), np.float32))\n"
            "seconds = time.perf_counter() - start\n"
            "print(json.dumps([seconds, engine.artefact_bytes, engine.arena_bytes]))\n"
        )
        command = [sys.executable, "-c", script, str(path), isa]
        # What is compiled once for all programs is there, as it is for every user but at first.
        tiny = Path(folder) / "tiny.safetensors"
        _tiny_program().save(tiny)
        subprocess.run(  # noqa: S603
            [*command[:3], str(tiny), isa], env=environment, check=True, capture_output=True
        )
        starts = []
        for _ in range(6):
            done = subprocess.run(  # noqa: S603
                command, env=environment, check=True, capture_output=True, text=True
            )
            starts.append(json.loads(done.stdout))
    return {
        "compile_seconds": starts[0][0],
        "cached_start_seconds": float(np.median([start[0] for start in starts[1:]])),
        "artefact_bytes": starts[0][1],
        "arena_bytes": starts[0][2],
    }


def _tiny_program() -> Program:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    return intact.quantize(model, [torch.randn(8, 3, 8, 8)])


def worker(args: argparse.Namespace) -> None:
    """Measure with one number of threads; a JSON text per line on standard output."""
    threads = args.threads[0]
    torch.set_num_threads(threads)
    for name in args.networks:
        weights = args.resnet20 if name == "resnet20" else None
        this = subject(name, weights)
        for batch in (NETWORKS[name],) if threads > 1 else (1, NETWORKS[name]):
            torch.compiler.reset()  # else it gives up after some compilations of the same code
            print(json.dumps(measure(this, batch, threads, args.isa, args.rounds)), flush=True)
        if threads == 1:
            facts = build_facts(this, args.isa)
            print(json.dumps({"network": name, "build": facts}), flush=True)


# -- all of them ---------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> Result:
    """Measure everything, in a process per number of threads."""
    lines: list[Result] = []
    environment = {**os.environ, **({} if args.isa == "auto" else VNNI_CAP)}
    load = os.getloadavg()[0]
    start = time.perf_counter()
    for threads in args.threads:
        command = [sys.executable, __file__, "--worker", "--isa", args.isa]
        command += ["--threads", str(threads), "--rounds", str(args.rounds)]
        command += ["--networks", *args.networks]
        command += ["--resnet20", str(args.resnet20)] if args.resnet20 else []
        with subprocess.Popen(  # noqa: S603
            command, env={**environment, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE,
            text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(json.loads(line))
                print(
                    f"{time.perf_counter() - start:4.0f} s  {_heading(lines[-1])}", file=sys.stderr
                )
        if process.returncode:
            raise SystemExit(f"measuring with {threads} thread(s) failed")
    try:
        peak = peaks(args.threads, 5, 150)
    except RuntimeError as error:
        print(f"no peak: {error}", file=sys.stderr)
        peak = {}
    return {
        "machine": {**machine.describe(), **machine.versions(), "load before": f"{load:.2f}"},
        "capped": args.isa,
        "rounds": args.rounds,
        "peak": peak,
        "lines": [line for line in lines if "seconds" in line],
        "builds": {line["network"]: line["build"] for line in lines if "build" in line},
    }


def _heading(line: Result) -> str:
    if "build" in line:
        return f"{line['network']}: build"
    return f"{line['network']}, batch {line['batch']}, {_threads(line['threads'])}"


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


# -- showing -------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """Who is how much faster, every contender's time per image, and what a build costs."""
    facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if k != "features")
    out = [f"{facts}; {result['rounds']} rounds; instruction sets: {result['capped']}", ""]
    out += _summary(result["lines"], result["peak"])
    out += ["", *_details(result["lines"])]
    if result["builds"]:
        out += ["", "| network | compile | cached start | artefact | working memory |"]
        out += ["|---|---|---|---|---|"]
        out += [
            f"| {name} | {seconds(b['compile_seconds'])} | {seconds(b['cached_start_seconds'])} | "
            f"{b['artefact_bytes']:,} B | {b['arena_bytes']:,} B per thread |"
            for name, b in result["builds"].items()
        ]
    left_out = {
        f"{_heading(line)}: {name}: {reason}"
        for line in result["lines"]
        for name, reason in line["left_out"].items()
    }
    return "\n".join(
        [*out, *(["", *(f"Left out: {t}" for t in sorted(left_out))] if left_out else [])]
    )


def _summary(lines: Sequence[Result], peak: Mapping[str, Mapping[int, float]]) -> list[str]:
    rows = [
        "| network | batch | threads | ours | fastest peer | its time | ratio | GMAC/s | of peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        times, batch = line["seconds"], line["batch"]
        rivals = {name: t for name, t in times.items() if name not in {OURS, CODES}}
        best = min(rivals, key=lambda name: rivals[name][0])
        ours = times[OURS][0]
        rate = line["macs"] * batch / ours / 1e9
        limit = peak.get(INSTRUCTION.get(line["isa"], ""), {}).get(line["threads"])
        share = f"{rate / limit:.0%} ({INSTRUCTION[line['isa']]})" if limit else ""
        cells = [
            line["network"],
            str(batch),
            str(line["threads"]),
            seconds(ours / batch),
            best,
            seconds(rivals[best][0] / batch),
            f"**{rivals[best][0] / ours:.2f}×**",
            f"{rate:,.0f}",
            share,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _details(lines: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    heads = [f"{li['network']} b{li['batch']}, {_threads(li['threads'])}" for li in lines]
    rows = [
        "Per image, median (quartiles):",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(lines)}",
    ]
    for name in names:
        cells = [_cell(line["seconds"].get(name), line["batch"]) for line in lines]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _cell(times: Sequence[float] | None, batch: int) -> str:
    if times is None:
        return ""
    middle, low, high = (seconds(t / batch) for t in times)
    return f"{middle} ({low} – {high})"


def main() -> None:
    """Measure, print Markdown, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--isa", default="auto", help="cap of ours; with one, oneDNN is capped to AVX-512 VNNI"
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--resnet20", type=Path, help="weights, from `intact train resnet20`")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    result = run(args)
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
