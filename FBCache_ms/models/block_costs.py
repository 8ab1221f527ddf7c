"""What one block of a transformer asks for, counted from the shapes; read without MindSpore."""

from dataclasses import dataclass

from ..predict.roofline import Work


def width(config):
    """D of a transformer's config."""
    return config.num_attention_heads * config.attention_head_dim


def channels(config):
    """C of a transformer's config, the velocity's."""
    return (getattr(config, "out_channels", None) or config.in_channels) * config.patch_size**2


@dataclass(frozen=True)
class BlockCosts:
    """What a kind of block asks for beside attention itself.

    Weights are in square matrices of the transformer's width, bytes that are read and written in units of the whole
    stream, of the text stream behind "text". Operators are as the loop's exported graph has them, views counted
    (tests/predict/test_roofline.py).

    Args:
        weights: of its matrix products.
        operands: what these read and write.
        passes: what all other operators read and write, each on its own.
        operators: how many it launches.
        text_products: in square matrices, the products that only the text stream behind the block needs; what follows
            is of those, too.
    """

    weights: float
    operands: float
    passes: float
    operators: int
    text_products: float = 0
    text_weights: float = 0
    text_operands: float = 0
    text_passes: float = 0
    text_operators: int = 0

    def works(self, shapes, operations, text):
        """The Works of one block of so many operations, what the text stream behind it needs only with ``text``."""
        stream, texts, width = shapes.stream(shapes.tokens), shapes.stream(shapes.text_tokens), shapes.width
        attention = 4 * shapes.batch * width * shapes.tokens**2
        products, weights, operators = operations - attention, self.weights, self.operators
        operands, others = self.operands * stream, self.passes * stream
        if not text:
            products -= 2 * shapes.batch * shapes.text_tokens * self.text_products * width**2
            weights, operators = weights - self.text_weights, operators - self.text_operators
            operands, others = operands - self.text_operands * texts, others - self.text_passes * texts
        return [
            Work("blocks: products", products, shapes.weights(weights) + operands, operators),
            Work("blocks: attention", attention, 4 * stream),
            Work("blocks: the rest", 0, others),
        ]


@dataclass(frozen=True)
class RefreshCosts:
    """What a kind of block asks for where its attention is kept and chosen tokens run through its MLPs.

    Units and what is counted are those of BlockCosts.

    Args:
        weights: of its matrix products, modulations among them.
        operands: what these read and write, in units of the chosen tokens' stream.
        passes: what other operators read and write of the whole stream, with what is kept of it.
        chosen_passes: and of the chosen tokens' stream.
        operators: how many it launches.
    """

    weights: float
    operands: float
    passes: float
    chosen_passes: float
    operators: int

    def works(self, shapes, operations, chosen):
        """The Works of one block of so many operations and chosen tokens."""
        stream, few = shapes.stream(shapes.tokens), shapes.stream(chosen)
        return [
            Work("blocks: products", operations, shapes.weights(self.weights) + self.operands * few, self.operators),
            Work("blocks: the rest", 0, self.passes * stream + self.chosen_passes * few),
        ]


def condition_works(shapes, operators, *terms):
    """What does not depend on the step: the embedded text, and vectors through layers of so many weights each."""
    width, batch, inputs = shapes.width, shapes.batch, shapes.config.joint_attention_dim
    embedded = batch * shapes.text_tokens * (inputs + width) + inputs * width
    text, others = operators
    return [
        Work("text embedding", 2 * batch * shapes.text_tokens * inputs * width, embedded * shapes.itemsize, text),
        Work("guidance, prompt and times", 2 * batch * sum(terms), sum(terms) * shapes.itemsize, others),
    ]


def ends_works(shapes, condition, weights, operators):
    """What every step computes around the blocks: the embedded latents and time, the output, the scheduler's update."""
    image = shapes.stream(shapes.image_tokens)
    operations = shapes.costs.rest - sum(work.operations for work in condition)
    return [Work("around the blocks", operations, weights * shapes.itemsize + 8 * image, operators)]
