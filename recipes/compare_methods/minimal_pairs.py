"""Make a small task of minimal pairs from held-out text, for models that are too small for lm-eval's own tasks.

A pair is a sentence of the text and the same sentence with one fault. A model is right if it finds the sentence of the
text likelier; chance is one half. There are three tasks: ``minimal_pairs_agreement`` (a verb in the wrong number),
``minimal_pairs_word_order`` (two neighbors exchanged) and ``minimal_pairs_swapped_word`` (a word replaced by another
one of the text).

    python recipes/compare_methods/minimal_pairs.py --text 'runs/prose/prose-validation.*.json.gz' --folder runs/pairs

Then: ``tasks: [minimal_pairs_agreement, minimal_pairs_word_order, minimal_pairs_swapped_word]`` and
``include_path: runs/pairs``.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from cola_lightning.data.documents import find_files, read_documents

SENTENCE = re.compile(r"[A-Z][^.!?\n]*[a-z][.!?](?=\s|$)")
WORDS = (6, 30)
"""Fewest and most words of a sentence."""
SINGULAR = {"is": "are", "was": "were", "has": "have", "does": "do"}
PLURAL = {value: key for key, value in SINGULAR.items()}
SUBJECTS = {"he": SINGULAR, "she": SINGULAR, "it": SINGULAR, "they": PLURAL, "we": PLURAL, "these": PLURAL}
"""Subjects whose number is certain, each with what makes its verb wrong."""

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""


def break_agreement(words: list[str], draw: random.Random, vocabulary: list[str]) -> list[str] | None:
    """Put the verb after a pronoun into the wrong number."""
    places = [
        n for n in range(1, len(words)) if words[n] in SUBJECTS.get(words[n - 1].lower(), {})
    ]  # the verb stands right after its subject
    if not places:
        return None
    place = draw.choice(places)
    return [*words[:place], SUBJECTS[words[place - 1].lower()][words[place]], *words[place + 1 :]]


def exchange_neighbors(words: list[str], draw: random.Random, vocabulary: list[str]) -> list[str] | None:
    """Exchange two different neighbors within the sentence, neither the first word nor the last."""
    places = [
        n for n in range(1, len(words) - 2)
        if words[n].isalpha() and words[n + 1].isalpha() and words[n].islower() and words[n + 1].islower()
        and words[n] != words[n + 1]
    ]  # fmt: skip
    if not places:
        return None
    place = draw.choice(places)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def swap_word(words: list[str], draw: random.Random, vocabulary: list[str]) -> list[str] | None:
    """Replace a word of four letters or more by another one of the text, as frequent words are drawn more often."""
    places = [n for n in range(1, len(words) - 1) if is_content(words[n])]
    if not places:
        return None
    place = draw.choice(places)
    other = draw.choice(vocabulary)
    return None if other == words[place] else [*words[:place], other, *words[place + 1 :]]


Fault = Callable[[list[str], random.Random, list[str]], list[str] | None]
FAULTS: dict[str, Fault] = {
    "agreement": break_agreement,
    "word_order": exchange_neighbors,
    "swapped_word": swap_word,
}


def is_content(word: str) -> bool:
    return len(word) >= 4 and word.isalpha() and word.islower()


def sentences_of(texts: list[str]) -> list[str]:
    """Return the sentences of a usual length, each once, in the order of the text."""
    found = (" ".join(match.group().split()) for text in texts for match in SENTENCE.finditer(text))
    return list(dict.fromkeys(one for one in found if WORDS[0] <= len(one.split()) <= WORDS[1]))


def make_pairs(texts: list[str], fault: Fault, count: int, seed: int) -> list[dict[str, str]]:
    """Make pairs of one kind; fewer than ``count`` if the text has no more sentences that allow the fault."""
    draw = random.Random(seed)
    sentences = sentences_of(texts)
    vocabulary = [word for sentence in sentences for word in sentence.split() if is_content(word)]
    draw.shuffle(sentences)
    pairs: list[dict[str, str]] = []
    for sentence in sentences:
        if len(pairs) < count and (changed := fault(sentence.split(), draw, vocabulary)):
            pairs.append({"good": sentence, "bad": " ".join(changed)})
    return pairs


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="files of held-out text, as data.validation_paths")
    parser.add_argument("--text_column", default="text", help="key of the text")
    parser.add_argument("--folder", type=Path, required=True, help="where the tasks are written")
    parser.add_argument("--count", type=int, default=1000, help="pairs of each kind; fewer if the text has no more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    texts = list(read_documents(find_files(options.text), options.text_column))
    options.folder.mkdir(parents=True, exist_ok=True)
    for kind, fault in FAULTS.items():
        name = f"minimal_pairs_{kind}"
        pairs = make_pairs(texts, fault, options.count, options.seed)
        file = (options.folder / f"{name}.jsonl").absolute()
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        (options.folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file), encoding="utf-8")
        print(f"{name}: {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
