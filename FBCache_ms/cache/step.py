"""One denoise step under a CacheContext's gates: the blocks that run, and what stands for the others.

``model`` is a Model (models/base.py) and ``given`` what every block of it gets.
"""

from mindspore import mint


def cached_step(model, cache, latents, text, given):
    """The velocity (B, S, C) at latents of that shape, through those blocks that the cache's gates let run."""
    blocks = sum(model.stacks)
    image, text = run_gates(model, cache.gates, 0, blocks, begin(model, cache, latents), text, given)
    return velocity(model, cache, blocks, image, text, given)


def begin(model, cache, latents):
    """The image stream that the first block gets, or the latents where a gate is asked before the embedding."""
    return latents if cache.whole_model else model.embed(latents)


def run_gates(model, gates, start, stop, image, text, given):
    """Blocks start to stop - 1, each gate deciding over its span; the blocks outside the spans always run."""
    for gate in gates:
        reached = approach(model, gate, start, image, text, given)
        if gate.decides and gate.decide(part(reached, "probes")):
            image, text = reuse(gate, reached)
        else:
            image, text = compute(model, gate, reached, given)
        start = gate.span(*model.stacks)[1]
    return run_blocks(model, start, stop, image, text, given)


def run_blocks(model, start, stop, image, text, given):
    """Blocks start to stop - 1."""
    for index in range(start, stop):
        image, text = model.block(index, image, text, given)
    return image, text


def approach(model, gate, start, image, text, given):
    """Blocks ``start`` up to a gate's span, and what is known there, a dictionary.

    "image" and "text" are the streams, "probes" has one for each of the gate's rules, "added" what the blocks have
    added if the forecast looks at that. Where only the span needs the text stream behind the last of these blocks, that
    block is divided: "text" is then the stream before it, and "unfinished" what finishes it. A part that would be empty
    is not there, since MindSpore 2.7.0 carries no empty tuple through a loop.
    """
    first, before, unfinished = gate.span(*model.stacks)[0], (image, text), ()
    divided = divides(model, gate, start)
    image, text = run_blocks(model, start, first - 1 if divided else first, image, text, given)
    if divided:
        image, unfinished = model.divided_block(first - 1, image, text, given)
    now = image, text
    probes = tuple([PROBES[name](model, gate, before, now, given) for name in gate.looks_at])
    added = (residual(model, gate, before, now, given),) if gate.takes_ratio else ()
    return parts(image, text, probes, added, unfinished)


def parts(image, text, probes, added, unfinished):
    """What approach returns, of tensors or of their shapes."""
    reached = {"image": image, "text": text}
    if len(probes) > 0:
        reached["probes"] = probes
    if len(added) > 0:
        reached["added"] = added
    if len(unfinished) > 0:
        reached["unfinished"] = unfinished
    return reached


def part(reached, name):
    """One of these, empty where it is not there."""
    return reached[name] if name in reached else ()


def reached_shapes(model, gate, image, text):
    """The shapes of what approach returns from the first block on, from those of the streams."""
    unfinished = ()
    if divides(model, gate, 0):
        unfinished = model.unfinished_shapes(gate.span(*model.stacks)[0] - 1, image, text)
    added = (gate.probe_shape,) if gate.takes_ratio else ()
    return parts(image, text, gate.probe_shapes, added, unfinished)


def divides(model, gate, start):
    """Whether the block before a gate's span is divided: only the span needs the text stream behind it."""
    first = gate.span(*model.stacks)[0]
    if start >= first or gate.needs_text or gate.probes_text:
        return False
    return model.divides(first - 1)


def reuse(gate, reached):
    """Both streams behind a gate's span, forecast from where ``approach`` has come to."""
    image, text = before_span(gate, reached["image"]), reached["text"]
    image_forecast, text_forecast = gate.forecast(part(reached, "added"))
    if gate.needs_text:
        text = gate.behind(text, text_forecast)
    return gate.behind(image, image_forecast), text


def compute(model, gate, reached, given):
    """Both streams behind a gate's span, from where ``approach`` has come to; the gate keeps what the span does."""
    first, last = gate.span(*model.stacks)
    image, text = reached["image"], reached["text"]
    if "unfinished" in reached:
        text = model.text_behind(first - 1, reached["unfinished"], given)
    before = before_span(gate, image)
    if gate.whole_model:
        image = model.embed(image)
    if gate.refreshes:
        image, behind = record_or_refresh(model, gate, image, text, given)
    else:
        image, behind = run_gates(model, gate.inner, first, last, image, text, given)
    if gate.whole_model:
        image = model.head(image, given)
    gate.store(part(reached, "probes"), part(reached, "added"), before, image, text, behind)
    return image, behind


def record_or_refresh(model, gate, image, text, given):
    """Both streams behind all blocks, of which the gate keeps what their parts give, of chosen tokens or of all."""
    refresh = gate.refresh()
    if refresh > 0:
        for index in range(len(gate.blocks)):
            block = gate.blocks[index]
            kept, chosen = tuple([each.kept() for each in block]), tuple([each.chosen(refresh) for each in block])
            image, text, added = model.refreshed_block(index, image, text, given, kept, chosen)
            for place in range(len(block)):
                block[place].added.write(added[place])
    else:
        for index in range(len(gate.blocks)):
            image, text, kept = model.recorded_block(index, image, text, given)
            for place in range(len(kept)):
                # MindSpore 2.10.0 takes a method of a tuple's item for an assignment to it.
                stream = gate.blocks[index][place]
                stream.record(*kept[place])
    return image, text


def before_span(gate, image):
    """What a gate's span adds to: the image stream, or the latents, of as many channels as the velocity has."""
    return image[..., : gate.channels] if gate.whole_model else image


def velocity(model, cache, start, image, text, given):
    """The velocity (B, S, C) from the streams that block number ``start`` gets, through the blocks from there on.

    Behind a span that is the whole model the image stream is the velocity.
    """
    image = run_blocks(model, start, sum(model.stacks), image, text, given)[0]
    cache.end_step()
    return image if cache.whole_model else model.head(image, given)


def compared(gate, stream):
    """The part of a stream, (image, text), that a gate compares: (B, S, D), or (B, T + S, D) with the text."""
    image, text = stream
    whole = mint.cat((text, image), dim=1) if gate.probes_text else image
    return whole[..., :: gate.factor] if gate.factor > 1 else whole


def residual(model, gate, before, now, given):
    """What the blocks between ``before`` and ``now`` added."""
    return compared(gate, now) - compared(gate, before)


def hidden(model, gate, before, now, given):
    """The stream behind those blocks."""
    return compared(gate, now)


def modulated(model, gate, before, now, given):
    """The first block's modulated input, before any block has run."""
    return model.modulated(before[0], given)


def latents(model, gate, before, now, given):
    """The latents, of as many channels as the velocity has, before the embedding."""
    return before_span(gate, now[0])


def verified(model, gate, before, now, given):
    """The stream behind the last block, run on what it is expected to get."""
    before_last = gate.inner[0]
    image, text = before_last.forecast(())
    stop = gate.span(*model.stacks)[1]
    return model.block(stop - 1, image.to(now[0].dtype), text.to(now[1].dtype), given)[0]


PROBES = {"residual": residual, "hidden": hidden, "modulated": modulated, "latents": latents, "verified": verified}
"""What a rule may look at, by its name in rules/when.py or in CacheConfig.probe."""


def cached_call(model, cache, latents, timestep, inputs, constants=None):
    """The velocity (B, S, C) of one call of the transformer, whoever runs the loop.

    Args:
        model: the Model.
        cache: the CacheContext; it takes a timestep that rises for a new generation, unless it is told of these.
        latents: (B, S, C).
        timestep: (B,), in [0, 1].
        inputs, constants: as for Model.prepare.

    Raises ValueError if the latents' shape is not the CacheContext's.
    """
    if (latents.shape[0], latents.shape[1], model.width) != cache.shape:
        raise ValueError(
            f"Invalid cache state: the latents are {latents.shape[0]} x {latents.shape[1]} tokens of width "
            f"{model.width}, the CacheContext is for {cache.shape}"
        )
    cache.begin_step(timestep[0])
    branch, common = model.prepare(inputs, constants, latents.dtype)
    text, given = model.condition(model.times(timestep, latents.dtype), branch, common)
    return cached_step(model, cache, latents, text, given)
