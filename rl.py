"""
GRPO by hand: learn what to write, and whether to write at all, at a price on latency.

The idea. For each query K rationales are sampled; the direct answer needs no sampling. The reward R
says how well the embedding after a rationale (or after none) finds the query's target t:

    R = p(t | q, r) + format - latency_penalty * tokens / T

    p(t | q, r)  softmax of similarities / temperature over the batch's candidates: the targets and
                 a hard negative of each pair
    format       0.1, but not for a rationale that ran out of tokens
    tokens       those that were sampled, at most T = max_new_tokens: seconds would vary

The step minimises

    rl_decision_weight * when + what
        + NCE(direct) + mean over the rationales of p_reason * NCE(reasoned)

Only `when` differentiates p_reason; elsewhere it is the rollout's, a constant weight. `when` and
`what` have a denominator each: in one mean over tokens (option rl_one_loss) the many tokens of long
rationales would drown the decision.

    when   With p = p_reason and gain = mean R_reason - R_direct (select.py's gain is one of
           log-probabilities) a query's expected reward is R_direct + p * gain, known without
           sampling the action. A wrong decision costs |gain|, so the loss is
               |gain| * cross-entropy of p and [gain > 0].
           Over queries that look alike its minimum is at p = G+ / (G+ + G-), the sums of what
           thinking wins and what it costs: p exceeds 1/2 where the mean gain is positive.
           Without the factor |gain| p would be a majority's vote: where thinking wins 1 for three
           queries of ten and costs 0.06 for seven, it would not think. The policy gradient has the
           factor p * (1 - p): a model that is sure would not learn that the price has gone up.
    what   the policy gradient on the sampled tokens. Each rationale counts by its importance weight
           p_reason: it was forced, and where the policy would not reason it teaches nothing.

Which GRPO this is, in five points:
    advantage   (R - mean R of the query's rationales) / sigma
    sigma       one for the batch: see credit(). One for each query would blow up tiny differences
                in price where all rationales are equally good
    reduction   sum over tokens, divided by the constant B * K * T: no bias towards a length
    ratio       pi / pi_old without a clip: a rollout is used once. No reference model, no KL
    stop token  </think> is trained, forced tokens are not: opening, tail, closing of what was cut

How to run: python train.py --stage rl     (its options: group rl of --help)
What it adds to InfoNCE alone, and what it learns without labels: results/rl.txt
Left out: a value network, several epochs per rollout, off-policy and asynchronous updates.
Sources: token-level loss without KL: DAPO, arXiv 2503.14476. Constant denominator: Dr. GRPO, arXiv
2503.20783. One deviation for a batch: Lite PPO, arXiv 2508.08221. `when`: outcome weighted
learning, Zhao et al., JASA 107 (2012); to use it here is ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import scale
from embed import (
    branch_vectors,
    candidates_of,
    decision_logits,
    gradcache_step,
    info_nce,
    log_target_prob,
    pool,
    prefix_dims,
    rationale_logprobs,
    row_lengths,
)
from model import generate
from processor import collate

FORMAT_BONUS = 0.1  # a sixth of what T tokens cost at the default penalty, 0.6
EPSILON = 1e-4  # on sigma, whose usual size is 0.15, for a batch without any variance

# --------------------------------------------------------------------------------------------------
# Rollouts


@dataclass
class Experience:
    """model.Rollouts of b queries, K rationales each, with vectors and p_reason. No gradients."""

    tokens: list  # [b][K] ids from <think> to <|endoftext|>
    num_sampled: torch.Tensor  # (b, K) tokens that the actor chose, </think> among them
    truncated: torch.Tensor  # (b, K) bool: it ran out of tokens and was closed by force
    old_logprobs: torch.Tensor  # (b, K, T) of the sampled tokens; zero after them
    vectors: torch.Tensor  # (b, 1 + K, H) unit; the direct one first
    p_reason: torch.Tensor  # (b,)


@torch.no_grad()
def rollouts(actor, processor, prompts, cfg, generator):
    """Sample K rationales for each of b prompts -> Experience. The K share the prompt's prefill."""
    actor.eval()
    device, K, T = actor.device, cfg.rl_rollouts, cfg.max_new_tokens
    sampling = dict(processor.generation, temperature=1.0, generator=generator)  # on-policy
    longest = max(processor.padded(row_lengths(prompts)))
    # Without gradients 4 times as many tokens fit. rl_batch is small: so are the answers' caches.
    together = max(1, 4 * cfg.chunk_tokens // longest)
    parts = []
    vectors = []
    logits = []
    for start in range(0, len(prompts), together):
        batch = collate(prompts[start : start + together], processor, device=device)
        part = generate(actor, batch, T, K, **sampling)
        parts.append(part)
        direct = pool(part.hidden, batch["ends"])  # (b, 1, H)
        reasoned = F.normalize(part.last.float(), dim=-1)  # (b, K, H), at each <|endoftext|>
        vectors.append(torch.cat((direct, reasoned), dim=1))
        logits.append(decision_logits(actor, part.hidden, batch, processor))
    return Experience(
        tokens=[row for part in parts for row in part.tokens],
        num_sampled=torch.cat([part.num_sampled for part in parts]).to(device),  # from the CPU
        truncated=torch.cat([part.truncated for part in parts]).to(device),
        old_logprobs=torch.cat([part.logprobs for part in parts]),
        vectors=torch.cat(vectors),
        p_reason=torch.cat(logits).softmax(-1)[:, 1],
    )


def leading(count, width):
    """count (b, K) -> mask (b, K, width), True at the first `count` places of each rollout."""
    return torch.arange(width, device=count.device) < count[..., None]


def unflatten(flat, count, width):
    """Numbers (n,) of tokens, rollout after rollout, count (b, K) of each -> (b, K, width).
    [x, y, z], [[2, 1]] and width 3 -> [[[x, y, 0], [z, 0, 0]]]."""
    mask = leading(count, width)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def sampled_logprobs(model, h, batch, processor, num_sampled, truncated, cfg):
    """Log-probabilities of the rollouts' tokens under the model that learns: states h (b, S, H) ->
    (b, K, T), laid out like Experience.old_logprobs."""
    flat = rationale_logprobs(model, h, batch, processor)
    # A truncated rollout has T sampled tokens in `flat`, then the closing \n</think>: cut off here.
    num_closing = len(processor.closing)
    T = cfg.max_new_tokens
    return unflatten(flat, num_sampled + num_closing * truncated, T + num_closing)[..., :T]


# --------------------------------------------------------------------------------------------------
# Rewards and credit


def rewards(p_target, num_sampled, truncated, cfg):
    """p_target (b, 1 + K), num_sampled and truncated (b, K) -> R (b, 1 + K), direct first."""
    price = cfg.latency_penalty * num_sampled / cfg.max_new_tokens
    direct = p_target[:, :1] + FORMAT_BONUS
    reason = p_target[:, 1:] + FORMAT_BONUS * ~truncated - price
    return torch.cat((direct, reason), dim=1)


def credit(reward):
    """R (B, 1 + K) of the joined batch -> gain (B,), advantage (B, K), sigma ().

    sigma, one for the batch, is a standard deviation from the query's centre, which lies midway
    between the direct reward and the rationales' mean. The direct reward is gain / 2 away from it,
    a rationale's gain / 2 + spread; both sides weigh a half, and spreads add up to 0. So sigma² =
    mean(gain²) / 4 + mean(spread²) / 2. The gain keeps it from being tiny if rationales are alike.
    """
    gain = reward[:, 1:].mean(1) - reward[:, 0]
    spread = reward[:, 1:] - reward[:, 1:].mean(1, keepdim=True)
    sigma = (spread.square().mean() / 2 + gain.square().mean() / 4).sqrt() + EPSILON
    varies = spread.abs().amax(1, keepdim=True) > 1e-6  # not mere rounding
    return gain, varies * spread / sigma, sigma


# --------------------------------------------------------------------------------------------------
# Losses: sums over some queries, divided by constants of the joined batch


def decision_loss(decision, gain):
    """Cross-entropy with [gain > 0], weighted by |gain|. decision (b,): the logit of p_reason."""
    right = (gain > 0).float()
    losses = F.binary_cross_entropy_with_logits(decision, right, reduction="none")
    return (gain.abs() * losses).sum()


def rationale_loss(logprobs, old_logprobs, num_sampled, advantage):
    """Policy gradient. logprobs and old_logprobs (b, K, T), num_sampled and advantage (b, K). The
    ratio is 1 unless the actor is a bf16 copy: then log-probabilities are up to 0.03 off."""
    mask = leading(num_sampled, logprobs.shape[2])
    ratio = (logprobs - old_logprobs).exp()
    return -(advantage[..., None] * ratio * mask).sum()


def one_mean_loss(decision, gain, sampled, advantage, sigma):
    """Ablation: decision and rationale tokens in one sum, with one denominator.

    A query counts as K rollouts that reason and K that answer directly, whatever p is. Around their
    common mean the former have the advantage gain / 2, the latter -gain / 2. So the decisions bring
    K * gain / 2 * (log p - log(1 - p)), and that difference of logs is the logit. A token has (R -
    common mean) / sigma = advantage + gain / 2 / sigma; a decision's gain is not divided by sigma,
    as in the main loss. sampled: of rationale_loss.
    """
    K = advantage.shape[1]
    when = -(K * gain / 2 * decision).sum()
    return when + rationale_loss(*sampled, advantage + gain[:, None] / 2 / sigma)


# --------------------------------------------------------------------------------------------------
# The step


def grpo_step(model, processor, pairs, cfg, generator, actor=None):
    """One batch's on-policy gradient, left in the model's parameters.

    pairs  [b] this process' share of the batch's B pairs, as in embed.contrastive_step
    cfg    train.Config: group rl, max_new_tokens, temperature, chunk_tokens, matryoshka_dims
    actor  writes the rollouts: a copy with the model's present weights, as scale.merge makes it
           (in one piece, nothing added), or None, the model itself, if it is such a one in fp32
    -> metrics of the joined batch; "sample": a rationale of our query with the lowest mean reward
    """
    actor = actor or model
    prompts = [pair["query"] for pair in pairs]
    documents, row_of_column, positive = candidates_of(pairs, model.device)
    B, K, T = len(positive), cfg.rl_rollouts, cfg.max_new_tokens
    dims = prefix_dims(cfg.matryoshka_dims)

    # 1) Roll out: K rationales of each query. All vectors come along, without gradients.
    roll = rollouts(actor, processor, prompts, cfg, generator)
    targets = torch.cat(branch_vectors(actor, processor, documents, cfg.chunk_tokens))
    # The joined batch is that of all processes. gather also gives the places of our rows in it.
    targets, _ = scale.gather(targets)
    targets = targets[row_of_column]  # (columns, H)
    p_reason, ours = scale.gather(roll.p_reason)  # (B,)

    # 2) Reward: probability of the target, a bonus for good form, minus the price of latency.
    target = positive[ours][:, None].expand(-1, 1 + K)
    p_target = log_target_prob(roll.vectors, targets, target, cfg.temperature).exp()
    reward, _ = scale.gather(rewards(p_target, roll.num_sampled, roll.truncated, cfg))  # (B, 1 + K)
    num_sampled, _ = scale.gather(roll.num_sampled)  # (B, K)
    truncated, _ = scale.gather(roll.truncated)

    # 3) Credit: the rationales' mean against the direct reward, each one against that mean.
    gain, advantage, sigma = credit(reward)
    weighted_advantage = p_reason[:, None] * advantage  # (B, K): the rationales were forced

    # 4) `when` and `what` of some queries.
    def query_loss(rows, h, batch):
        direct, reason = decision_logits(model, h, batch, processor).unbind(1)
        decision = reason - direct
        count = roll.num_sampled[rows]
        logprobs = sampled_logprobs(model, h, batch, processor, count, roll.truncated[rows], cfg)
        sampled = logprobs, roll.old_logprobs[rows], count
        at = ours[rows]  # their places in the joined batch
        # Schulman's k2, an estimate of KL(actor, model): half the mean square of log p - log p'
        gap = roll.old_logprobs[rows] - logprobs.detach()
        metrics = {"logp_k2": float(gap.square().sum() / num_sampled.sum() / 2)}
        if cfg.rl_one_loss:
            loss = one_mean_loss(decision, gain[at], sampled, advantage[at], sigma)
            return loss / (num_sampled.sum() + 2 * B * K), metrics
        when = decision_loss(decision, gain[at]) / B
        what = rationale_loss(*sampled, weighted_advantage[at]) / (B * K * T)
        metrics["loss_when"] = float(when.detach())
        return cfg.rl_decision_weight * when + what, metrics

    # 5) InfoNCE on the direct and on the reasoned path: keeps the space, learns from new pairs.
    def contrast(vectors):
        q = vectors["query"]  # (B, 1 + K, H)
        t = vectors["document"][row_of_column, 0]  # (columns, H)
        nce_direct = info_nce(q[:, 0], t, positive, cfg.temperature, dims=dims)
        # A query's K rationales have one target, so none is another's negative (same_target).
        reasoned = q[:, 1:].flatten(0, 1)  # (B * K, H)
        weights = p_reason.clamp(min=1e-6).repeat_interleave(K)  # their sum must not be 0
        column = positive.repeat_interleave(K)
        nce_reasoned = info_nce(reasoned, t, column, cfg.temperature, weights, dims)
        # info_nce divides by the weights' sum: times their mean, the mean of p_reason * loss.
        return nce_direct + p_reason.mean() * nce_reasoned

    model.train()
    loss, metrics = gradcache_step(
        model, processor, prompts, roll.tokens, K, documents, query_loss, contrast, cfg.chunk_tokens
    )

    # 6) The log.
    worst = int(reward[ours, 1:].mean(1).argmin())
    sample = {
        "id": pairs[worst]["id"],
        "rationale": processor.rationale_text(roll.tokens[worst][0]),
        "reward": float(reward[ours[worst], 1]),
        "direct": float(reward[ours[worst], 0]),
    }
    metrics |= summary(reward, p_reason, gain, advantage)
    metrics["loss"] = loss
    metrics["tokens"] = float(num_sampled.float().mean())
    metrics["truncated"] = float(truncated.float().mean())
    return metrics | {"sample": sample}


def summary(reward, p_reason, gain, advantage):
    """Rewards and decisions: means over the joined batch."""
    direct, reason = reward[:, 0], reward[:, 1:].mean(1)
    figures = {
        "reward": p_reason * reason + (1 - p_reason) * direct,
        "reward_reason": reason,
        "reward_direct": direct,
        "p_reason": p_reason,
        "reason_rate": p_reason > 0.5,
        "decision_right": (p_reason > 0.5) == (gain > 0),
        "decision_entropy": torch.distributions.Bernoulli(p_reason).entropy(),
        "zero_variance": (advantage == 0).all(1),
    }
    return {name: float(x.float().mean()) for name, x in figures.items()}
