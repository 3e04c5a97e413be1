#!/usr/bin/env python3
"""Training steps of GPT-2 Medium (354 M) on one GPU: PyTorch and Tessera, one after the other in the same run.

    python3 tests/bench/gpt2_step.py --tessera build/release/tessera --micro-batch 64 --seconds 20
    python3 tests/bench/gpt2_step.py --tessera build/release/tessera --context 65536 --micro-batch 1

A step is one micro-batch forward and backward, clipped, and AdamW (--accumulate N: N micro-batches to an update). Rows of the table:

    pytorch              GPT-2 as published (layernorm, biases, learned positions), dense softmax through SDPA, torch.compile, bf16 autocast over fp32
                         weights, fused AdamW
    softmax, GPT-2's     the same layers in Tessera: gpt2-medium-softmax.yaml with layernorm, biases and learned positions
    softmax              configs/gpt2-medium-softmax.yaml as it is
    sparse, untrained    configs/gpt2-medium-sparse.yaml with thresholds of 0, as a run begins: half of the edges active, every tile computed
    sparse, few tiles    the same with thresholds so high that most tiles are empty (--threshold), as late in a run; the tile skip rate is beside it

Every row runs in a process of its own, so that the device's memory is its own. tokens/s are medians of whole steps. "used" is what the device has in
use at the end (of all processes: nothing else may run); beside it what Tessera planned, or the most that PyTorch's allocator handed out. MFU counts
the work that is done (Tessera: active tiles), dense-eq. that of causal attention without skipping.
"""
import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

LAYERS, HEADS, WIDTH, VOCABULARY, PADDED = 24, 16, 1024, 50257, 50304
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPT2_LAYERS = ["model.positions=learned", "model.norm=layernorm", "model.bias=true"]


def measure_pytorch(micro_batch, context, accumulate, seconds, compiled):
    """The baseline, in this process. Prints one JSON object."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x):
            batch, tokens, _ = x.shape
            q, k, v = (t.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for t in self.qkv(self.norm_1(x)).split(WIDTH, dim=2))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(a.transpose(1, 2).reshape(batch, tokens, WIDTH))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(PADDED, WIDTH), nn.Embedding(context, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(WIDTH)
            for name, p in self.named_parameters():
                if p.dim() > 1:  # branches that end in the residual stream start smaller
                    nn.init.normal_(p, std=0.02 / (math.sqrt(2 * LAYERS) if name.endswith(("proj.weight", "down.weight")) else 1))
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)  # tied
            return F.cross_entropy(logits.view(-1, PADDED), targets.view(-1))

    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Model().cuda()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=3e-4, betas=(0.9, 0.95), fused=True
    )
    run = torch.compile(model) if compiled else model
    tokens, targets = (torch.randint(VOCABULARY, (micro_batch, context), device="cuda") for _ in range(2))

    def step():
        for _ in range(accumulate):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = run(tokens, targets) / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    timed(3)  # compiles, and the allocator finds its sizes
    torch.cuda.reset_peak_memory_stats()
    group = max(1, math.ceil(1.0 / timed(2)))  # about a second between two waits
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        times.append(timed(group))
    median = sorted(times)[len(times) // 2]
    free, total = torch.cuda.mem_get_info()
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "version": torch.__version__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens_per_s": micro_batch * context * accumulate / median,
                "step_ms": 1e3 * median,
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "used_bytes": total - free,
            }
        )
    )


def pytorch_row(o, micro_batch):
    """The baseline in a process of its own, or None and why not."""
    command = [sys.executable, __file__, "--only-pytorch", "--micro-batch", str(micro_batch), "--context", str(o.context)]
    command += ["--accumulate", str(o.accumulate), "--seconds", str(o.seconds)] + ([] if o.compile else ["--no-compile"])
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"pytorch at micro-batch {micro_batch}: not measured: {last}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def tessera_row(o, micro_batch, config, sets):
    step = micro_batch * o.context * o.accumulate
    sets = [f"model.context={o.context}", f"train.micro_batch={micro_batch}", f"train.tokens_per_step={step}"] + sets + o.set
    command = [o.tessera, "bench", "step", "--device", "cuda", "--config", str(CONFIGS / config), "--json", "--steps", "5", "--seconds", str(o.seconds)]
    for s in sets:
        command += ["--set", s]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(f"{config} at micro-batch {micro_batch}: not measured: {result.stderr.strip()}", file=sys.stderr)
        return None
    return json.loads(result.stdout)


def gib(n):
    return f"{n / 2**30:.1f}" if n else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tessera", default="build/release/tessera", help="the binary, built with CUDA")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[32, 64], help="sequences a micro-batch; several make a table each")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches to an update")
    parser.add_argument("--seconds", type=float, default=20, help="spent on each measurement, beyond warm-up and compilation")
    parser.add_argument("--threshold", type=float, default=4.0, help="attention.threshold.init of the row with few tiles")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every Tessera row, as in tessera train")
    parser.add_argument("--rounds", type=int, default=1, help="the whole table so many times: how much do the figures move")
    parser.add_argument("--no-pytorch", dest="pytorch", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="PyTorch without torch.compile")
    parser.add_argument("--json", metavar="FILE", help="every measured row also goes to this file, an object a line")
    parser.add_argument("--only-pytorch", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()

    if o.only_pytorch:
        return measure_pytorch(o.micro_batch[0], o.context, o.accumulate, o.seconds, o.compile)
    if not Path(o.tessera).is_file():
        sys.exit(f"gpt2_step.py: no binary at {o.tessera}. Build it: cmake --preset release && cmake --build --preset release; or --tessera PATH")
    if o.pytorch:
        try:
            import torch

            if not torch.cuda.is_available():
                sys.exit("gpt2_step.py: PyTorch sees no GPU: nothing can be measured here")
        except ImportError:
            print("gpt2_step.py: PyTorch is not installed here: no baseline, Tessera's rows alone (pip install torch)", file=sys.stderr)
            o.pytorch = False

    rows = [
        ("softmax, GPT-2's", "gpt2-medium-softmax.yaml", GPT2_LAYERS),
        ("softmax", "gpt2-medium-softmax.yaml", []),
        ("sparse, untrained", "gpt2-medium-sparse.yaml", ["attention.threshold.init=0"]),
        ("sparse, few tiles", "gpt2-medium-sparse.yaml", [f"attention.threshold.init={o.threshold:g}"]),
    ]
    records = open(o.json, "a") if o.json else None
    measured = 0
    for round_, micro_batch in ((r, m) for r in range(o.rounds) for m in o.micro_batch):
        results = [("pytorch", pytorch_row(o, micro_batch))] if o.pytorch else []
        results += [(name, tessera_row(o, micro_batch, config, sets)) for name, config, sets in rows]
        results = [(name, r) for name, r in results if r]
        if not results:
            continue
        measured += len(results)
        first = next((r for name, r in results if name != "pytorch"), results[0][1])
        print(f"\n{first['device']}: context {o.context}, micro-batch {micro_batch}, {o.accumulate} micro-batch(es) an update", end="")
        print(f", round {round_ + 1} of {o.rounds}" if o.rounds > 1 else "")
        if "gemm_gflops" in first:
            print(f"speed of light: bf16 GEMM {first['gemm_gflops'] / 1e3:.0f} TFLOP/s, copy {first['copy_gbytes'] / 1e3:.2f} TB/s")
        print(f"{'':20}{'tokens/s':>10}{'step ms':>9}{'ratio':>7}{'MFU':>7}{'dense-eq.':>10}{'used GiB':>10}{'planned/alloc.':>15}{'edges 0':>9}{'tiles skipped':>15}")
        base = dict(results).get("pytorch")
        if base and "mfu_dense_equivalent" in first:  # the same work a token as the first of Tessera's rows, up to embeddings
            base["mfu"] = base["mfu_dense_equivalent"] = first["mfu_dense_equivalent"] / first["tokens_per_s"] * base["tokens_per_s"]
        for name, r in results:
            planned = r.get("planned_bytes", r.get("allocated_bytes"))
            line = f"{name:20}{r['tokens_per_s']:>10.0f}{r['step_ms']:>9.1f}"
            line += f"{r['tokens_per_s'] / base['tokens_per_s']:>7.3f}" if base else f"{'-':>7}"
            line += "".join(f"{100 * r[key]:>{width - 1}.1f}%" if r.get(key) else f"{'-':>{width}}" for key, width in (("mfu", 7), ("mfu_dense_equivalent", 10)))
            line += f"{gib(r.get('used_bytes')):>10}{gib(planned):>15}"
            line += f"{r['edge_sparsity']:>9.4f}{r['tile_skip_rate']:>15.4f}" if "edge_sparsity" in r else f"{'-':>9}{'-':>15}"
            print(line)
            if records:
                records.write(json.dumps({"row": name, "context": o.context, "micro_batch": micro_batch, "round": round_, **r}) + "\n")
                records.flush()
        sys.stdout.flush()
    if not measured:
        sys.exit("gpt2_step.py: nothing could be measured (see above)")


if __name__ == "__main__":
    main()
