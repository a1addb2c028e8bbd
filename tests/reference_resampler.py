"""The multi-scope resampler once more: float64, in loops over images, scopes, tokens and patches.

Written from the equations, reading nothing but a state dict and what the resampler is, so that the real one can be
held against it; the study's variants, too.
"""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
DEFAULT = {
    "scope_layout": "heads",
    "query_init": "none",
    "scope_prior": "gaussian",
    "learn_scopes": True,
    "share_kv": True,
    "fusion": "token",
    "patch_conv": True,
    "tile_heads": True,
    "cell_residual": True,
}


def described(config: Any, **variant: Any) -> SimpleNamespace:
    """What a resampler is: the fields of its configuration, and those in which it or a variant is not the default."""
    queries = {} if config.kind == "ms_resampler" else {"scope_layout": "branches", "query_init": "learned"}
    form = queries | (config.branch_form or {}) | variant
    return SimpleNamespace(**config.to_dict(), num_scopes=config.num_scopes, **DEFAULT | form)


def resample(weights: Weights, config: Any, x_BNC: np.ndarray, patch_grid, token_grid) -> tuple[np.ndarray, ...]:
    """y (B, M, T), g (B, S, M) and A (B, S, M, N) of the last layer."""
    results = [resample_image(weights, config, x_NC, patch_grid, token_grid) for x_NC in x_BNC]
    return tuple(np.stack(parts) for parts in zip(*results, strict=True))


def resample_image(weights: Weights, config: Any, x_NC: np.ndarray, patch_grid, token_grid):
    width = config.hidden_size
    patches, anchors = centres(patch_grid), centres(token_grid)
    u = [linear(weights, "input_proj", layer_norm(weights, "input_norm", x, config)) for x in x_NC]
    if config.patch_conv:
        u = [patch + neighbours(weights, u, patch_grid, j) for j, patch in enumerate(u)]
    if config.query_init == "none":
        u = [layer_norm(weights, "patch_norm", patch, config) for patch in u]
    shares = [cell_shares(patch_grid, token_grid, i) for i in range(len(anchors))]
    if config.moving_scopes:
        patches, shares = moved(weights, u, patch_grid, token_grid)
    z = (
        [np.zeros(width)] * len(anchors)
        if config.query_init == "none"
        else [
            base_query(weights["query"][0], token_grid, i) + positions(anchor, width)
            for i, anchor in enumerate(anchors)
        ]
    )
    if config.moving_scopes:
        z = [weights["space.code_proj.weight"] @ positions(share @ centres(patch_grid), 32, 4) for share in shares]
    if config.query_init == "content":
        z = [query + share @ u for query, share in zip(z, shares, strict=True)]
    for layer in range(config.num_hidden_layers):
        cells = [share @ u if config.cell_residual else 0 for share in shares]
        z, gates, maps = scope_layer(weights, f"layers.{layer}.", config, z, u, cells, anchors, patches, token_grid)
    y = [linear(weights, "output_proj", layer_norm(weights, "output_norm", token, config)) for token in z]
    if config.pooled_mlp:
        pooled = [share @ x_NC for share in shares]
        hidden = [[gelu(v) for v in linear(weights, "mlp.0", mean)] for mean in pooled]
        y = [token + linear(weights, "mlp.2", np.array(values)) for token, values in zip(y, hidden, strict=True)]
    return np.stack(y), gates, maps


def resample_clip(weights: Weights, config: Any, x_NC: np.ndarray, patch_grid, token_grid, clip):
    """y, g and A of a clip of (frames, steps): tokens and patches have places (t, y, x), and a softmax is over all."""
    frames, steps = clip
    times = [cell_shares((frames, 1), (steps, 1), step) for step in range(steps)]
    u, patches, shares, codes = [], [], [], []
    for frame, x in enumerate(np.split(x_NC, frames)):
        v = [linear(weights, "input_proj", layer_norm(weights, "input_norm", patch, config)) for patch in x]
        v = [patch + neighbours(weights, v, patch_grid, j) for j, patch in enumerate(v)]
        v = [layer_norm(weights, "patch_norm", patch, config) for patch in v]
        places, of_cells = (
            centres(patch_grid),
            [cell_shares(patch_grid, token_grid, i) for i in range(math.prod(token_grid))],
        )
        codes.append(np.zeros((len(of_cells), config.hidden_size)))
        if config.moving_scopes:
            places, of_cells = moved(weights, v, patch_grid, token_grid)
            seen = [positions(share @ centres(patch_grid), 32, 4) for share in of_cells]
            codes[-1] = np.array(seen) @ weights["space.code_proj.weight"].T
        u += v
        patches += [((frame + 0.5) / frames, *place) for place in places]
        shares.append(of_cells)
    cells = range(math.prod(token_grid))
    anchors = [((step + 0.5) / steps, *place) for step in range(steps) for place in centres(token_grid)]
    joint = [np.concatenate([t * shares[f][i] for f, t in enumerate(of_step)]) for of_step in times for i in cells]
    z = [sum(t * codes[f][i] for f, t in enumerate(of_step)) for of_step in times for i in cells]
    for layer in range(config.num_hidden_layers):
        means, grid = [share @ u for share in joint], (steps, *token_grid)
        z, gates, maps = scope_layer(weights, f"layers.{layer}.", config, z, u, means, anchors, patches, grid)
    y = [linear(weights, "output_proj", layer_norm(weights, "output_norm", token, config)) for token in z]
    if config.pooled_mlp:
        hidden = [[gelu(v) for v in linear(weights, "mlp.0", share @ x_NC)] for share in joint]
        y = [token + linear(weights, "mlp.2", np.array(values)) for token, values in zip(y, hidden, strict=True)]
    return np.stack(y), gates, maps


def neighbours(weights: Weights, u, patch_grid, j: int) -> np.ndarray:
    """The 3 x 3 patches around patch j, those that are there, weighted channel by channel."""
    row, column = divmod(j, patch_grid[1])
    total = weights["patch_conv.bias"]
    for y, x in product(range(3), range(3)):
        at = row + y - 1, column + x - 1
        if 0 <= at[0] < patch_grid[0] and 0 <= at[1] < patch_grid[1]:
            total = total + weights["patch_conv.weight"][:, 0, y, x] * u[at[0] * patch_grid[1] + at[1]]
    return total


def scope_layer(weights: Weights, at: str, config: Any, z, u, cells, anchors, patches, token_grid):
    """One layer: tokens, gates (S, M) and maps (S, M, N)."""
    heads, scopes = config.num_attention_heads, config.num_scopes
    branches = config.scope_layout == "branches"
    tokens, gates, maps = [], np.zeros((scopes, len(z))), np.zeros((scopes, len(z), len(u)))
    for i, token in enumerate(z):
        outputs, queries = [], []
        for s in range(scopes if branches else 1):
            query, q = token, [None] * heads
            if config.query_init != "none":
                query = token + weights[at + "scope_embedding"][s]
                normed = layer_norm(weights, at + "query_norm", query, config)
                q = np.split(linear(weights, at + "q_proj", normed), heads)
            heard = []
            for head in range(heads):
                scope = s if branches else scope_of_head(config, head)
                a = attend(weights, at, config, q[head], head, s, u, anchors[i], patches, token_grid)
                heard.append(sum(a[j] * value(weights, at, config, u[j], head, s) for j in range(len(u))))
                maps[scope, i] += a / (heads if branches else config.scope_heads[scope])
            outputs.append(heard)
            queries.append(query)
        token, gates[:, i] = fuse(weights, at, config, outputs, queries)
        token = token + cells[i]
        hidden = linear(weights, at + "ffn.0", layer_norm(weights, at + "ffn_norm", token, config))
        tokens.append(token + linear(weights, at + "ffn.2", np.array([gelu(v) for v in hidden])))
    return tokens, gates, maps


def scope_of_head(config, head) -> int:
    """In the layout "heads": the first scope whose heads, with those of the scopes before it, reach this far."""
    return next(scope for scope in range(config.num_scopes) if head < sum(config.scope_heads[: scope + 1]))


def attend(weights, at, config, q, head, query_set, u, anchor, patches, token_grid) -> np.ndarray:
    """The attention of one query and head over all patches."""
    scores = []
    for u_j, patch in zip(u, patches, strict=True):
        if config.query_init != "none":
            key = linear(weights, at + "k_proj", u_j + positions(patch, config.hidden_size))
            score = q @ pick_head(key, config, head, query_set) / math.sqrt(len(q))
        else:
            hidden = [gelu(v) for v in linear(weights, at + "score.0", u_j)]
            score = weights[at + "score.2.weight"][head] @ np.array(hidden)
        scores.append(score + prior(weights, at, config, query_set, head, anchor, patch, patches, token_grid))
    scores = np.array(scores)
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def prior(weights, at, config, query_set, head, anchor, patch, patches, token_grid) -> float:
    """B of one anchor and patch; of places (t, y, x), C as well."""
    if len(patch) == 3:
        there = prior(weights, at, config, query_set, head, anchor[1:], patch[1:], patches, token_grid[1:])
        return there + time_prior(weights, at, query_set, head, (anchor[0] - patch[0]) * token_grid[0])
    sigma = weights[at + "prior.sigma"][query_set, head]
    if config.scope_prior == "none" or sigma >= 1e30:
        return 0.0
    if config.scope_prior == "gaussian":
        if config.tile_heads:
            offset = weights[at + "prior.offset"][query_set, head]
            anchor = [a + o / n for a, o, n in zip(anchor, offset, token_grid, strict=True)]
        squared = squared_pitches(anchor, patch, token_grid)
        if config.learn_scopes:
            sigma = sigma * math.exp(weights[at + "prior.log_scale"][query_set, head])
        return -squared / (2 * sigma**2)
    squared = squared_pitches(anchor, patch, token_grid)
    nearest = min(squared_pitches(anchor, other, token_grid) for other in patches)
    return 0.0 if squared <= max((2 * sigma) ** 2, nearest) + 1e-4 else -math.inf


def time_prior(weights, at, query_set, head, away: float) -> float:
    """C of a head whose step is so many pitches after a frame."""
    tau = weights[at + "time.sigma"][query_set, head]
    if tau >= 1e30:
        return 0.0
    tau = tau * math.exp(weights[at + "time.log_scale"][query_set, head])
    return -((away + weights[at + "time.offset"][query_set, head]) ** 2) / (2 * tau**2)


def squared_pitches(anchor, patch, token_grid) -> float:
    return sum(((a - p) * n) ** 2 for a, p, n in zip(anchor, patch, token_grid, strict=True))


def value(weights, at, config, u_j, head, query_set) -> np.ndarray:
    return pick_head(linear(weights, at + "v_proj", u_j), config, head, query_set)


def pick_head(x, config, head, query_set) -> np.ndarray:
    """The part of a key or value that a head of a query set reads."""
    if not config.share_kv:
        x = np.split(x, config.num_scopes)[query_set]
    return np.split(x, config.num_attention_heads)[head]


def fuse(weights, at, config, outputs, queries) -> tuple[np.ndarray, np.ndarray]:
    """z of one token, and its weight for each scope."""
    heads, scopes = config.num_attention_heads, config.num_scopes

    def gate(x):
        return layer_norm(weights, at + "gate_norm", x, config) @ weights[at + "gate.weight"].T

    if config.scope_layout == "heads":
        together = np.concatenate(outputs[0])
        if config.fusion == "token":
            g = softmax(gate(together + queries[0]))
        else:
            g = softmax(weights[at + "gate.logits"]) if config.fusion == "static" else np.full(scopes, 1 / scopes)
        scaled = np.concatenate([scopes * g[scope_of_head(config, head)] * outputs[0][head] for head in range(heads)])
        return linear(weights, at + "o_proj", scaled) + queries[0], g
    joined = [np.concatenate(output) for output in outputs]
    if config.fusion == "head":
        logits = np.stack([gate(o + q) for o, q in zip(joined, queries, strict=True)])
        g = np.stack([softmax(logits[:, head]) for head in range(heads)], axis=1)
        mixed = [sum(g[s, head] * outputs[s][head] for s in range(scopes)) for head in range(heads)]
        mean = g.mean(axis=1)
        return linear(weights, at + "o_proj", np.concatenate(mixed)) + sum(
            w * q for w, q in zip(mean, queries, strict=True)
        ), mean
    z = [linear(weights, at + "o_proj", o) + q for o, q in zip(joined, queries, strict=True)]
    if config.fusion == "token":
        g = softmax(np.array([gate(z_s)[0] for z_s in z]))
    else:
        g = softmax(weights[at + "scope_logits"]) if config.fusion == "static" else np.full(scopes, 1 / scopes)
    return sum(w * z_s for w, z_s in zip(g, z, strict=True)), g


def centres(grid) -> list[tuple[float, float]]:
    return [((row + 0.5) / grid[0], (column + 0.5) / grid[1]) for row in range(grid[0]) for column in range(grid[1])]


def positions(point, width, finest=6) -> np.ndarray:
    """Unit-scale sin-cos code: for y, then for x, all sines, then all cosines, from wavelength 2 to 2 / 2^finest."""
    code = []
    for coordinate in point:
        last = max(width // 4 - 1, 1)
        angles = [coordinate * math.pi * 2 ** (finest * k / last) for k in range(width // 4)]
        code += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return math.sqrt(2) * np.array(code)


def base_query(base_DHW: np.ndarray, token_grid, i: int) -> np.ndarray:
    """The learned grid at token i, bilinear between its points, constant beyond them."""
    weights_and_places = []
    for index, tokens, points in zip(divmod(i, token_grid[1]), token_grid, base_DHW.shape[1:], strict=True):
        place = min(max((index + 0.5) * points / tokens - 0.5, 0), points - 1)
        low = int(place)
        weights_and_places.append([(1 - place + low, low), (place - low, min(low + 1, points - 1))])
    return sum(wy * wx * base_DHW[:, y, x] for wy, y in weights_and_places[0] for wx, x in weights_and_places[1])


def cell_shares(patch_grid, token_grid, i: int) -> np.ndarray:
    """The weight of each patch in the mean of those that a token's cell touches."""
    share = np.zeros(patch_grid)
    rows, columns = (
        slice(index * patches // tokens, math.ceil((index + 1) * patches / tokens))
        for index, tokens, patches in zip(divmod(i, token_grid[1]), token_grid, patch_grid, strict=True)
    )
    share[rows, columns] = 1
    return share.flatten() / share.sum()


def moved(weights: Weights, u, patch_grid, token_grid) -> tuple[list[tuple[float, float]], list[np.ndarray]]:
    """The places (y, x) of patches in [0, 1]^2 where space moves, and the weight of each patch in each cell."""
    height, width = patch_grid
    much = np.array([1 / (1 + math.exp(-8 * (weights["space.density.weight"][0] @ patch))) for patch in u])
    much = much.reshape(patch_grid)
    blurred = np.array(
        [[much[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean() for x in range(width)] for y in range(height)]
    )
    rho = 0.05 / (height * width) + 0.95 * blurred / blurred.sum()
    row_edges = [rho[:y].sum() for y in range(height + 1)]
    rows = [(row_edges[y] + row_edges[y + 1]) / 2 for y in range(height)]
    column_edges = []
    for y in range(height):
        near = sum(
            math.exp(-2 * ((rows[y] - rows[other]) * token_grid[0]) ** 2) * rho[other] for other in range(height)
        )
        column_edges.append([near[:x].sum() / near.sum() for x in range(width + 1)])
    places = [(rows[y], (column_edges[y][x] + column_edges[y][x + 1]) / 2) for y in range(height) for x in range(width)]
    shares = []
    for row, column in product(range(token_grid[0]), range(token_grid[1])):
        share = [
            common(row_edges, y, row, token_grid[0]) * common(column_edges[y], x, column, token_grid[1])
            for y, x in product(range(height), range(width))
        ]
        shares.append(np.array(share) * token_grid[0] * token_grid[1])
    return places, shares


def common(edges, span: int, cell: int, cells: int) -> float:
    """How long the part is that a span between edges and one of equal cells of [0, 1] have in common."""
    return max(0.0, min(edges[span + 1], (cell + 1) / cells) - max(edges[span], cell / cells))


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def layer_norm(weights: Weights, name: str, x: np.ndarray, config: Any) -> np.ndarray:
    centred = x - x.mean()
    return (
        centred / math.sqrt((centred**2).mean() + config.layer_norm_eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    odds = np.exp(x - x.max())
    return odds / odds.sum()
