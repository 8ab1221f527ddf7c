"""What a family of transformers owes to the cache: one file a family, with a class that has the methods of Model.

cache/step.py and cache/loop.py run the blocks, decide and forecast; they know no more of a model than what stands here.
A family's class is an ms.jit_class around mindone's transformer, so that a graph can call its methods. Its file has
beside it

- KIND, mindone's class, which gets an attribute ``cached_model``: the one of this form around a transformer;
- CONSTANTS, the arguments of mindone's construct that shape its graph;
- COSTS, the module of what is known without MindSpore: the pipeline's name, its components and guidance, the published
  config, and what counts operations and bytes: stacks, width, channels, step_costs, block, condition, ends;
- BY_BRANCH, those of its inputs that each guidance branch has of its own;
- BY_TOKEN, {input: (whose tokens it has, "text", "image" or "both", text first, and along which axis)};
- MODULATION, parts of the names of the layers that make what scales and shifts the streams;
- graph_inputs(transformer, arguments): the other arguments of a call as the graph takes them, or what is refused; among
  them may be ``longest``, the tokens of the guidance branches' longest text;
- why_foreign(transformer): what stands in the way, in words, or None; and why_not_probed(transformer, probe), where a
  rule's probe may not be there; and why_not_refreshed(transformer), where it has recorded_block.

Two streams run through the blocks: the image (B, S, D) and the text (B, T, D). ``given`` is a dictionary of what every
block gets beside them. A dictionary, since a graph in STRICT syntax makes no named tuple and no object of its own
(tried with MindSpore 2.7.0 and 2.10.0).
"""


class Model:
    """A transformer as the cache sees it; what raises NotImplementedError here, a family has to have.

    Args:
        transformer: mindone's.

    ``stacks`` says how many double and how many single blocks it has, which are counted together, doubles first;
    ``width`` is D.
    """

    def __init__(self, transformer):
        stacks = [getattr(transformer, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")]
        self.transformer, self.stacks, self.width = transformer, tuple(map(len, stacks)), transformer.inner_dim

    def idle(self):
        """The weights that no graph reads: those of the text stream behind the last block, where it has its own."""
        return ()

    # Once a generation, and once a call.

    def prepare(self, inputs, constants, dtype):
        """What no step changes: what each guidance branch has of its own, and what is common to all, two dictionaries.

        The former has the text stream, (..., T, D), under "text". Its tensors have the leading axes of their inputs.

        Args:
            inputs: tensors by the names that mindone's construct has for them.
            constants: {name: value} of those that shape the graph.
            dtype: the latents'.
        """
        raise NotImplementedError

    def hands_over_blocks(self, common):
        """Whether a graph hands each of its loops the weights of the blocks that run there."""
        return True

    def times(self, timesteps, dtype):
        """What is known of timesteps (N,) in [0, 1] before the loop, (N, E): a step then reads its own."""
        raise NotImplementedError

    def condition(self, time, branch, common):
        """The text stream and ``given`` of a call, from its rows (B, E) of times() and from what prepare() made."""
        raise NotImplementedError

    # What a call runs.

    def embed(self, latents):
        """The image stream that the first block gets."""
        raise NotImplementedError

    def cell(self, index):
        """The block number ``index``, mindone's."""
        doubles = self.stacks[0]
        if index < doubles:
            return self.transformer.transformer_blocks[index]
        return self.transformer.single_transformer_blocks[index - doubles]

    def block(self, index, image, text, given):
        """The image and the text stream behind block number ``index``."""
        raise NotImplementedError

    def head(self, image, given):
        """The velocity (B, S, C) of the image stream behind the last block."""
        raise NotImplementedError

    def modulated(self, image, given):
        """The first block's modulated input, which TeaCache looks at."""
        raise NotImplementedError

    # What of ``given`` depends on the step: a step that computes has it from the loop of reuses before.

    def pending(self, given):
        """That part of it, the modulation vector "temb" unless a family says otherwise."""
        return {"temb": given["temb"]}

    def pending_shapes(self, batch):
        """Its tensors' shapes."""
        return {"temb": (batch, self.width)}

    def resume(self, given, pending):
        """``given`` with that part in it."""
        return {name: pending[name] if name in pending else value for name, value in given.items()}

    # A block in two: first without what only the text stream behind it needs, and that later, if at all.

    def divides(self, index):
        """Whether that can be done with block number ``index``."""
        return False

    def divided_block(self, index, image, text, given):
        """The image stream behind it, and a tuple of what text_behind takes."""
        raise NotImplementedError

    def text_behind(self, index, unfinished, given):
        """The text stream behind it."""
        raise NotImplementedError

    def unfinished_shapes(self, index, image, text):
        """The shapes of what text_behind takes, from those of the streams."""
        raise NotImplementedError

    # A block whose attention is kept, so that a refresh runs chosen tokens' MLPs alone.

    def recorded_block(self, index, image, text, given):
        """The streams behind block number ``index``, and for each of its own streams what attention and the MLP gave.

        A double block has two streams, text first, a single one both as one. What is kept is as large as the stream.
        """
        raise NotImplementedError

    def refreshed_block(self, index, image, text, given, kept, chosen):
        """The streams behind the block, and for each of its own what the MLP gives, of ``chosen`` tokens anew.

        Args:
            kept: for each of its streams what recorded_block gave, with what has been refreshed since.
            chosen: for each of its streams the tokens, an int32 vector.
        """
        raise NotImplementedError

    # True CFG.

    def guide(self, negative, positive, scale):
        """v_neg + s (v_pos - v_neg)."""
        return negative + scale.to(negative.dtype) * (positive - negative)
