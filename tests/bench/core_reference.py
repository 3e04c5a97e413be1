#!/usr/bin/env python3
"""CORE of a Hugging Face model folder, computed in Python: a second implementation of the rules of `tessera eval --core`, to compare with.

    python3 tests/bench/core_reference.py MODEL BUNDLE [--tasks a,b] [--limit N] [--context T] [--compare core.json]

MODEL: a folder with config.json, model.safetensors and tokenizer.json, as `tessera export --format hf` writes it. BUNDLE: core.yaml,
eval_meta_data.csv and eval_data/, whose files may be .zst. Prints each task's accuracy and the mean of the centred ones, as JSON. With --compare, the
output of `tessera eval CHECKPOINT --core BUNDLE --json` with the same --tasks and --limit: exit code 1 when an accuracy differs from it.

Needs `pip install torch transformers tokenizers jinja2 pyyaml zstandard`. Nothing of Tessera's own runs here: the random numbers are Python's, prompts
are rendered by Jinja, tokens are the tokenizers package's, logits PyTorch's, one prompt at a time. All but the logits is in functions that take a
tokenizer and a model as plain callables; tests/fixtures/core/record.py calls them with a model that is none.
"""
import argparse
import csv
import io
import json
import math
import os
import random
import sys

import jinja2
import yaml

ITEM = {
    "multiple_choice": "{{ item.query }}{{ delimiter }}{{ item.choices[choice] }}",
    "schema": "{{ item.context_options[choice] }}{{ delimiter }}{{ item.continuation }}",
    "language_modeling": "{{ item.context | trim }}{{ delimiter }}{{ item.continuation }}",
}
QUESTION = "{{ item.context | trim }}{{ delimiter }}"


def read_text(path):
    """A file's text; of PATH.zst where there is no PATH. None where there is neither."""
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    if os.path.exists(path + ".zst"):
        import zstandard

        with open(path + ".zst", "rb") as file:
            return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), encoding="utf-8", newline="").read()
    return None


def read_bundle(folder):
    """Tasks in the order of core.yaml; "data" is None where the file is missing."""
    with open(os.path.join(folder, "core.yaml"), encoding="utf-8") as file:
        entries = yaml.safe_load(file)["icl_tasks"]
    with open(os.path.join(folder, "eval_meta_data.csv"), encoding="utf-8", newline="") as file:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    tasks = []
    for entry in entries:
        text = read_text(os.path.join(folder, "eval_data", entry["dataset_uri"]))
        tasks.append({"label": entry["label"], "type": entry["icl_task_type"], "shots": entry["num_fewshot"][0],
                      "delimiter": entry.get("continuation_delimiter", " "), "baseline": baselines[entry["label"]],
                      "data": None if text is None else [json.loads(line) for line in text.split("\n") if line.strip()]})
    return tasks


def selected(data, limit):
    """The items of an evaluation: shuffled, then the first `limit` (0: all)."""
    data = list(data)
    random.Random(1337).shuffle(data)
    return data[:limit] if limit else data


def shot_indices(items, index, shots):
    return random.Random(1234 + index).sample([i for i in range(len(items)) if i != index], shots) if shots else []


def render(task, items, index):
    """Prompts of one item: one for each candidate, or for language modelling [without the continuation, with it]."""
    template = jinja2.Template(ITEM[task["type"]], keep_trailing_newline=True)
    delimiter = task["delimiter"]
    shots = "".join(template.render(item=items[i], delimiter=delimiter, choice=items[i].get("gold")) + "\n\n"
                    for i in shot_indices(items, index, task["shots"]))
    item = items[index]
    if task["type"] == "language_modeling":
        question = jinja2.Template(QUESTION, keep_trailing_newline=True).render(item=item, delimiter=delimiter)
        return [(shots + question).strip(), shots + template.render(item=item, delimiter=delimiter)]
    count = len(item["choices"] if task["type"] == "multiple_choice" else item["context_options"])
    return [shots + template.render(item=item, delimiter=delimiter, choice=c) for c in range(count)]


def common_length(sequences):
    length = 0
    for column in zip(*sequences):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def prompts(task, items, index, encode, bos, context):
    """What the model sees for one item: (tokens, first, last, whole) for each candidate, the answer being tokens[first:last].

    The answer begins where the candidates begin to differ (multiple choice: common prefix), or is what they all end with (schema: common suffix), or
    is what the continuation adds (language modelling). A prompt longer than the context loses its first tokens; `whole` is False when that took
    tokens of the answer, or the token that stands before it. The token at 0 has nothing before it that could predict it: it is never in the answer."""
    sequences = [[bos] + encode(text) for text in render(task, items, index)]
    if task["type"] == "multiple_choice":
        starts = [common_length(sequences)] * len(sequences)
    elif task["type"] == "schema":
        suffix = common_length([s[::-1] for s in sequences])
        starts = [len(s) - suffix for s in sequences]
    else:
        starts, sequences = [common_length(sequences)], [sequences[1]]
    found = []
    for tokens, start in zip(sequences, starts):
        cut = max(0, len(tokens) - context)
        found.append((tokens[cut:], max(1, start - cut), len(tokens) - cut, start - cut >= min(1, cut)))
    return found


def choose(task, candidates, score):
    """The index of the candidate with the lowest mean loss over its answer; language modelling: 1 when every token of the answer was predicted.

    An answer without tokens (a candidate that is the beginning of all others) has no loss to compare: it is chosen only when no candidate has one,
    and then the first is. The first of equals is chosen. In language modelling an answer without tokens, or that does not fit into the context, is
    wrong. score(tokens) -> (losses, predictions): at [t], of tokens[t + 1] given tokens[:t + 1]."""
    if task["type"] == "language_modeling":
        tokens, first, last, whole = candidates[0]
        predictions = score(tokens)[1]
        return int(whole and last > first and all(predictions[t - 1] == tokens[t] for t in range(first, last)))
    means = []
    for tokens, first, last, _ in candidates:
        losses = score(tokens)[0]
        means.append(math.fsum(losses[first - 1:last - 1]) / (last - first) if last > first else math.inf)
    return means.index(min(means))


def evaluate(task, items, encode, bos, context, score):
    """Right answers, and what choose() gave for each item."""
    chosen = [choose(task, prompts(task, items, i, encode, bos, context), score) for i in range(len(items))]
    right = [c == 1 if task["type"] == "language_modeling" else c == item["gold"] for c, item in zip(chosen, items)]
    return sum(right), chosen


def load_model(folder, context):
    """(encode, bos, context, score) of a model folder."""
    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # special tokens in the text are text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(tokens):
        logits = model(torch.tensor([tokens])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
        return losses.tolist(), logits.argmax(-1).tolist()

    known = context or getattr(model.config, "n_positions", None) or model.config.max_position_embeddings
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<|endoftext|>"), known, score


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("bundle")
    parser.add_argument("--tasks", default="", help="labels, separated by commas; default: all")
    parser.add_argument("--limit", type=int, default=0, help="items of each task, at most; 0: all")
    parser.add_argument("--context", type=int, default=0, help="tokens of a prompt, at most; 0: the model's")
    parser.add_argument("--compare", help="JSON of tessera eval --core")
    options = parser.parse_args()
    encode, bos, context, score = load_model(options.model, options.context)
    wanted = options.tasks.split(",") if options.tasks else None
    results, centred = [], []
    for task in read_bundle(options.bundle):
        if task["data"] is None or (wanted and task["label"] not in wanted):
            continue
        items = selected(task["data"], options.limit)
        right, _ = evaluate(task, items, encode, bos, context, score)
        accuracy = right / len(items)
        centred.append((accuracy - task["baseline"] / 100) / (1 - task["baseline"] / 100))
        results.append({"label": task["label"], "items": len(items), "right": right, "accuracy": accuracy, "centered": centred[-1]})
        print(f"{task['label']:35} {accuracy:.4f}", file=sys.stderr, flush=True)
    print(json.dumps({"context": context, "mean_centered": sum(centred) / len(centred), "tasks": results}, indent=2))
    if options.compare:
        with open(options.compare, encoding="utf-8") as file:
            theirs = {t["label"]: t for t in json.load(file)["tasks"]}
        different = [r["label"] for r in results if r["label"] not in theirs or (theirs[r["label"]]["right"], theirs[r["label"]]["items"]) != (r["right"], r["items"])]
        for label in different:
            print(f"differs: {label}: {theirs.get(label)}", file=sys.stderr)
        print(f"{len(results) - len(different)} of {len(results)} tasks the same", file=sys.stderr)
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
