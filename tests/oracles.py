"""Definitions of the formulas in float64 plain Python, written from the papers. The library must compute the same.

Nothing here imports rlhf_recipes, is vectorised or is fast. Arguments are (nested) sequences of Python numbers, in
practice `tensor.tolist()`. Results are floats or nested lists. Masked cells are never read.
"""

import math
from fractions import Fraction


def _valid(row, mask_row):
    """Return the entries of one row whose mask is 1, in order."""
    return [x for x, keep in zip(row, mask_row, strict=True) if keep]


def _scatter(entries, mask_row):
    """Invert `_valid`: put entries back into their cells, and 0 elsewhere."""
    remaining = iter(entries)
    return [next(remaining) if keep else 0.0 for keep in mask_row]


def _cells(array, mask):
    """Return every unmasked entry of a (B, T) array as one list."""
    return [x for row, mask_row in zip(array, mask, strict=True) for x in _valid(row, mask_row)]


def _clip(x, low, high):
    return low if x < low else high if x > high else x


def moments(entries):
    """Return (count, mean, population variance) of a flat list, exactly rounded, or (0, 0, 0) if it is empty."""
    exact = [Fraction(x) for x in entries]
    if not exact:
        return 0, 0.0, 0.0
    mean = sum(exact) / len(exact)
    return len(exact), float(mean), float(sum((x - mean) ** 2 for x in exact) / len(exact))


def masked_moments(array, mask):
    """Return the `moments` of the unmasked cells of a (B, T) array."""
    return moments(_cells(array, mask))


def whiten(array, mask, center=True):
    """Return (x - mean)/sd of the unmasked cells, plus the mean if not `center`, and 0 on masked cells."""
    _, mean, variance = masked_moments(array, mask)
    shift = 0.0 if center else mean
    return [
        _scatter([(x - mean) / math.sqrt(variance) + shift for x in _valid(row, mask_row)], mask_row)
        for row, mask_row in zip(array, mask, strict=True)
    ]


def explained_variance(values, returns, mask):
    """Return 1 - Var(R - V)/Var(R), or 0 if the returns are constant."""
    targets, predictions = _cells(returns, mask), _cells(values, mask)
    residuals = [target - prediction for target, prediction in zip(targets, predictions, strict=True)]
    variance = moments(targets)[2]
    return 1.0 - moments(residuals)[2] / variance if variance > 0 else 0.0


def debiased_ema_moments(batches, decay):
    """Return mean and variance by Adam's bias correction of the raw moments, in exact rationals.

    E[x^j] = (1 - b) sum_i b^(k-i) E_i[x^j] / (1 - b^k) for j = 1, 2; variance = E[x^2] - E[x]^2 (Kingma & Ba 2015,
    section 3). This form cancels in floating point. Rationals do not round, so it is safe here. It is not the
    recursion under test.
    """
    decay = Fraction(decay)
    first = second = weight = Fraction(0)
    for batch in batches:
        exact = [Fraction(x) for x in batch]
        first = decay * first + (1 - decay) * sum(exact) / len(exact)
        second = decay * second + (1 - decay) * sum(x * x for x in exact) / len(exact)
        weight = decay * weight + (1 - decay)
    mean = first / weight
    return float(mean), float(second / weight - mean * mean)


def exact_kl(logps, ref_logps):
    """Return KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v)), by enumeration of the vocabulary."""
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(logps, ref_logps, strict=True))


def exact_sequence_kl(first, first_ref, second, second_ref):
    """Return the KL of two-token sequences, by enumeration. `second[v]` holds the log-probs after first token v."""
    joint, joint_ref = [], []
    for token, (p, q) in enumerate(zip(first, first_ref, strict=True)):
        joint += [p + x for x in second[token]]
        joint_ref += [q + x for x in second_ref[token]]
    return exact_kl(joint, joint_ref)


def adaptive_kl_coef(kl_coef, kl, *, target_kl, kl_horizon, n_sequences):
    """Control log(coef) proportionally, with the error clipped to +-0.2 (Ziegler et al. 2019, section 2.2)."""
    error = _clip(kl / target_kl - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * n_sequences / kl_horizon)


def shaped_rewards(scores, kl, mask, kl_coef):
    """Return -kl_coef * kl_t on every valid token, plus the score on the last valid one."""
    shaped = []
    for score, kl_row, mask_row in zip(scores, kl, mask, strict=True):
        rewards = [-kl_coef * x for x in _valid(kl_row, mask_row)]
        if rewards:
            rewards[-1] += score
        shaped.append(_scatter(rewards, mask_row))
    return shaped


def centered(parts, mask):
    """Return parts minus the mean at their place, over the rows that have a later valid token there."""
    goes_on = [[bool(m and any(row[t + 1 :])) for t, m in enumerate(row)] for row in mask]
    centers = []
    for t in range(len(mask[0])):
        here = [row[t] for row, on in zip(parts, goes_on, strict=True) if on[t]]
        centers.append(math.fsum(here) / len(here) if here else 0.0)
    return [
        [x - c if o else x for x, c, o in zip(row, centers, on, strict=True)]
        for row, on in zip(parts, goes_on, strict=True)
    ]


def dense_rewards(scores, parts, kl, mask, kl_coef):
    """Return part_t - kl_coef * kl_t, but on the last valid token the rest of the score in place of its part."""
    shaped = []
    for score, parts_row, kl_row, mask_row in zip(scores, parts, kl, mask, strict=True):
        own = _valid(parts_row, mask_row)
        own[-1:] = [score - math.fsum(own[:-1])] if own else []
        penalties = [kl_coef * x for x in _valid(kl_row, mask_row)]
        shaped.append(_scatter([x - y for x, y in zip(own, penalties, strict=True)], mask_row))
    return shaped


def gae(rewards, values, mask, *, gamma, lam, bootstrap_values=None):
    """Return A_t = sum_l (gamma lam)^l delta_{t+l}, the explicit O(T^2) sum of Schulman et al. 2016, eq. 16."""
    advantages = []
    for row, mask_row in enumerate(mask):
        r, v = _valid(rewards[row], mask_row), _valid(values[row], mask_row)
        v = [*v, 0.0 if bootstrap_values is None else bootstrap_values[row]]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        sums = [
            math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))
        ]
        advantages.append(_scatter(sums, mask_row))
    return advantages


def lambda_returns(rewards, values, mask, *, gamma, lam, bootstrap_values=None):
    """Return the lambda-weighted mean of n-step returns (Sutton & Barto 2018, eq. 12.3). GAE's `returns` equal it."""
    targets = []
    for row, mask_row in enumerate(mask):
        r, v = _valid(rewards[row], mask_row), _valid(values[row], mask_row)
        v = [*v, 0.0 if bootstrap_values is None else bootstrap_values[row]]

        def n_step(t, n, r=r, v=v):
            return math.fsum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n]

        entries = []
        for t in range(len(r)):
            remaining = len(r) - t
            partial = math.fsum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, remaining))
            entries.append(partial + lam ** (remaining - 1) * n_step(t, remaining))
        targets.append(_scatter(entries, mask_row))
    return targets


def mean_of_sequence_means(per_token, mask):
    """Return (1/B) sum_i (1/|o_i|) sum_t x_it. An empty sequence adds 0 and still counts in B."""
    means = [math.fsum(v) / len(v) if (v := _valid(row, m)) else 0.0 for row, m in zip(per_token, mask, strict=True)]
    return math.fsum(means) / len(means)


def value_loss_cell(value, old_value, target, cliprange):
    """Return 0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) of one token."""
    clipped = old_value + _clip(value - old_value, -cliprange, cliprange)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def clipped_value_loss(values, old_values, returns, mask, cliprange):
    """Return the mean of the sequence means of `value_loss_cell`."""
    per_token = [
        [value_loss_cell(*cells, cliprange) if keep else 0.0 for *cells, keep in zip(*rows, strict=True)]
        for rows in zip(values, old_values, returns, mask, strict=True)
    ]
    return mean_of_sequence_means(per_token, mask)


def clipped_surrogate(logps, old_logps, advantages, mask, *, epsilon_low, epsilon_high):
    """Return the mean of sequence means of -min(rho A, clip(rho) A): Schulman et al. 2017, eq. 7, as a loss.

    It is also DeepSeekMath's eq. 1, and the reference for TRL's policy loss with loss_type="grpo".
    """

    def cell(logp, old_logp, advantage):
        ratio = math.exp(logp - old_logp)
        return -min(ratio * advantage, _clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * advantage)

    return _surrogate(cell, logps, old_logps, advantages, mask)


def trust_region(log_ratios, advantages, mask, *, level, epsilon_low, epsilon_high):
    """Return 1 for each token whose ratio at this level is inside the region, or whose advantage leads back."""

    def row(ratios, row_advantages):
        kept = []
        for t, advantage in enumerate(row_advantages):
            moved = {"token": ratios[t : t + 1], "prefix": ratios[: t + 1], "sequence": ratios}[level]
            ratio = math.prod(math.exp(x) for x in moved)
            outside = ratio > 1 + epsilon_high if advantage > 0 else advantage < 0 and ratio < 1 - epsilon_low
            kept.append(0.0 if outside else 1.0)
        return kept

    return [
        _scatter(row(_valid(ratios, keep), _valid(row_advantages, keep)), keep)
        for ratios, row_advantages, keep in zip(log_ratios, advantages, mask, strict=True)
    ]


def leave_one_out_means(groups):
    """Return for each score of each group the mean of the others; `None` is no score."""

    def mean(others):
        known = [x for x in others if x is not None]
        return sum(known) / len(known) if known else 0.0

    return [[mean(group[:i] + group[i + 1 :]) for i in range(len(group))] for group in groups]


def surrogate_with_min_over_ratios(logps, old_logps, advantages, mask, *, epsilon_low, epsilon_high):
    """Return the notes' third formula, -min(rho, clip(rho)) A, as a counterexample: it is wrong for A < 0."""

    def cell(logp, old_logp, advantage):
        ratio = math.exp(logp - old_logp)
        return -min(ratio, _clip(ratio, 1 - epsilon_low, 1 + epsilon_high)) * advantage

    return _surrogate(cell, logps, old_logps, advantages, mask)


def _surrogate(cell, logps, old_logps, advantages, mask):
    per_token = [
        [cell(*cells) if keep else 0.0 for *cells, keep in zip(*rows, strict=True)]
        for rows in zip(logps, old_logps, advantages, mask, strict=True)
    ]
    return mean_of_sequence_means(per_token, mask)


def least_tokens(columns, size):
    """Return the fewest computed tokens of a cut of neighbours in one of three orders, by trying every cut.

    A cut has the number of micro-batches and at most the largest tile of the cut into `size` rows by total length,
    which also orders equal rows. The same is true of the last part by itself.
    """
    by_length = sorted(columns, key=sum)
    equal = [by_length[i : i + size] for i in range(0, len(columns), size)]
    limits = max(map(_tokens, equal)), max(map(_last_tokens, equal))
    orders = (sorted(by_length, key=key) for key in (sum, max, lambda row: row[0]))
    return min(_least_of_cuts(rows, len(equal), limits) for rows in orders)


def _tokens(rows):
    return len(rows) * sum(max(of_part) for of_part in zip(*rows, strict=True))


def _last_tokens(rows):
    return _tokens([row[-1:] for row in rows])


def _least_of_cuts(rows, parts, limits):
    if parts == 1:
        return _cost(rows, limits)
    heads = [rows[:end] for end in range(1, len(rows) - parts + 2)]
    return min(_cost(head, limits) + _least_of_cuts(rows[len(head) :], parts - 1, limits) for head in heads)


def _cost(rows, limits):
    return _tokens(rows) if _tokens(rows) <= limits[0] and _last_tokens(rows) <= limits[1] else math.inf
