"""Which picture is used for what: decided once, by label and style alone, so that no stage can peek.

- `finetune`: target style, in demo/dataset; the LoRA (and the evaluator) train on them.
- `evaluation`: target style, of labels that demo/dataset lacks; nothing is trained on them.
- `target_other`: the remaining target style; only the evaluator trains on them, to know the style.
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
    """The split of every (label, style) pair.

    Fine-tuning and evaluation labels are drawn from those that every style covers; held-out base pairs from
    labels that are neither, so that every evaluation label is known to the base model in each of its own
    styles.
    """
    styles_of: dict[str, set[str]] = {}
    for label, style in pairs:
        styles_of.setdefault(label, set()).add(style)
    num_styles = len({style for _, style in pairs})
    complete = sorted(label for label, styles in styles_of.items() if len(styles) == num_styles)
    if missing := set(showcase) - set(complete):
        raise ValueError(
            f"emoji.showcase names labels that some style lacks: {sorted(missing)}; choose others"
        )

    draw = random.Random(seed)
    others = [label for label in complete if label not in showcase]
    draw.shuffle(others)
    num_drawn = evaluation_labels - len(showcase)
    evaluation = {*showcase, *others[:num_drawn]}
    finetune = set(others[num_drawn : num_drawn + finetune_images])
    rest = others[num_drawn + finetune_images :]
    base_styles = sorted({style for _, style in pairs} - {target_style})
    held_out = {(label, draw.choice(base_styles)) for label in draw.sample(rest, held_out_pairs)}
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
