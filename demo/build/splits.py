"""Splits of the images, assigned once by label and style, so that no stage trains on test images.

- `finetune`: target style, in demo/dataset; the LoRA (and the evaluator) train on them.
- `evaluation`: target style, of labels that are not in demo/dataset; nothing is trained on them.
- `target_other`: rest of the target style; only the evaluator trains on them, to learn the style.
- `held_out`: base style, of random pairs; nothing is trained on them.
- `base`: base style, of `base_labels` labels; the VAE, the evaluator and the base model train on them.
- `base_other`: base style, of the remaining labels; the VAE and the evaluator train on them.
"""

import random
from typing import Literal

Split = Literal["base", "base_other", "held_out", "finetune", "evaluation", "target_other"]
Pair = tuple[str, str]


def assign_splits(
    pairs: list[Pair],
    target_style: str,
    showcase: list[str],
    finetune_images: int,
    evaluation_labels: int,
    base_labels: int,
    held_out_pairs: int,
    seed: int,
) -> dict[Pair, Split]:
    """Return the split of every (label, style) pair.

    Fine-tuning and evaluation labels are chosen from those that every style covers; held-out base pairs from
    labels that are neither, so that every evaluation label is known to the base model in each of its
    base styles.
    """
    styles_of: dict[str, set[str]] = {}
    for label, style in pairs:
        styles_of.setdefault(label, set()).add(style)
    num_styles = len({style for _, style in pairs})
    complete = sorted(label for label, styles in styles_of.items() if len(styles) == num_styles)
    if missing := set(showcase) - set(complete):
        raise ValueError(
            f"emoji.showcase names labels that are missing in some style: {sorted(missing)}. Choose others"
        )

    rng = random.Random(seed)
    others = [label for label in complete if label not in showcase]
    rng.shuffle(others)
    num_chosen = evaluation_labels - len(showcase)
    evaluation = {*showcase, *others[:num_chosen]}
    finetune = set(others[num_chosen : num_chosen + finetune_images])
    rest = others[num_chosen + finetune_images :]
    base_styles = sorted({style for _, style in pairs} - {target_style})
    held_out = {(label, rng.choice(base_styles)) for label in rng.sample(rest, held_out_pairs)}
    known = evaluation | finetune | {label for label, _ in held_out}
    known |= set([label for label in rest if label not in known][: base_labels - len(known)])

    def split(pair: Pair) -> Split:
        label, style = pair
        if style == target_style:
            return (
                "evaluation" if label in evaluation else "finetune" if label in finetune else "target_other"
            )
        return "held_out" if pair in held_out else "base" if label in known else "base_other"

    return {pair: split(pair) for pair in pairs}
