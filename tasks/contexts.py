"""Other contexts: the control of every task is the adapter of a context that shares nothing with the question's own."""

import random


def other_contexts(parts, args, notes, first=None):
    """For each context the indices of --controls others that share no part with it, drawn at random.

    parts: a set for each context, of its documents, sessions or tasks. All contexts get the same number, that of the
    one with the fewest; one that shares a part with every other context gets none. Others are drawn from the first
    `first` contexts before the rest: those are read anyway.
    """
    draw = random.Random(args.seed)
    order = list(range(len(parts)))
    others = []
    for own in parts:
        draw.shuffle(order)
        apart = []
        for j in order:
            if not own & parts[j]:
                apart.append(j)
        apart.sort(key=lambda j: first is not None and j >= first)
        others.append(apart[:args.controls])
    count = min((len(some) for some in others if some), default=args.controls)
    alone = others[:first].count([])
    if alone and "adapter-shuffled" in args.method:
        notes.append(f"adapter-shuffled: {alone} contexts share a part with every other one, so they are left out of "
                     "the control and of the gap, not of the adapter's own row")
    return [some[:count] for some in others]
