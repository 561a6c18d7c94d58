"""
GRPO by hand: learn what to write, and whether to write at all, with a price on latency.

The idea. Per query a group of G rollouts, half forced to reason and half direct, so that both actions are always seen. The direct branch
is deterministic: it is computed once and counts G/2 times. A rollout's reward says how well the embedding after it finds the target:
    R = p(t | q, r) + format − price · tokens / T_max       p = exp m(q, r) in [0, 1]: softmax over the batch's targets at temperature 0.02;
                                                            format = 0.1 when the rationale closed itself (a direct answer is well formed);
                                                            tokens are those generated: charged, because seconds are not reproducible
Two losses, never averaged together (one decision token among 30 would carry 3 % of a token mean, and collapse):
    decision   J(q) = p · mean R_reason + (1 − p) · R_direct + β · entropy(p), p = p_reason. Its maximum is p* = σ(gain / β) with gain = mean
               R_reason − R_direct, in closed form: no noise from sampling the action. The loss is the cross-entropy between p* and p, whose
               gradient in the logit is p − p*; that of J itself, p(1 − p)·(...), vanishes where the decision is sure, so that a model
               which was taught to think would not learn that the price has gone up. p_reason thus foretells the gain, and reasoning
               when p_reason > tau means: when gain > β · logit(tau)
    rationale  token-level clipped policy gradient on the tokens that were chosen, </think> among them. The rollouts were forced to reason, so
               each counts by its importance weight, p_reason: where the policy would not reason, what it was made to write teaches nothing

Which GRPO this is, in six lines:
    advantage          of a rationale's tokens: (R − mean R of the query's rationales) / σ; what a query's rationales share says whether to
                       reason, and the decision's loss has it. The reward is summed before it is normalised
    σ                  root mean square of R − group mean over all rollouts of the batch, the direct ones among them, not each group's own,
                       which would let a tiny price decide wherever quality ties
    reduction          token level over a constant denominator (rollouts x T_max): no length bias
    clip / KL          ratio clipped to 0.8 ... 1.28; no reference model, no KL
    stop token         </think> is trained; forced tokens (the opening, a closing after running out, the tail) are not
    deleted            value network, several epochs per rollout, group-wise std, advantage for embeddings (these learn by InfoNCE, beside)
A group whose rationales all got the same reward teaches none of their tokens; its decision is learnt all the same. Picture tokens are banned
at sampling and in the log-probability alike.

How to run: stage `rl` of train.py. The log names what tells a live run from a dead one: reward, reason rate, entropy of the decision,
zero-variance share, clip share, |logp_rollout − logp_train|, tokens, seconds of generate/score/update, and one sample.

Left out: off-policy updates, asynchronous rollouts, group size by difficulty.
Source: the design notes (not in this folder), section 5; the choices and where they come from: DAPO (2503.14476), Dr.GRPO (2503.20783),
Lite PPO (2508.08221).
"""

import time

import numpy as np
import torch

from embed import NOTHING, branch_logp, collate, decision_logits, direct_vectors, grad_cache, info_nce, passes, pool
from embed import gather_objects, gather_rows, rank
from model import generate


def rewards(quality, tokens, closed_itself, price, t_max, bonus=0.1):
    """R of every rollout. quality in [0, 1], tokens (generated), closed_itself (bool), all of one shape."""
    return quality + bonus * closed_itself.float() - price * tokens.float() / t_max


def advantages(reason, direct, eps=1e-4):
    """reason (B, G/2) and direct (B,) rewards -> advantages (B, G/2) of the reasoned rollouts and live (B,) bool.

    The direct rollout stands for G/2 equal ones: the group mean is that of all G. Divided by the root mean square of what is left over all
    B·G rollouts. A group in which all G rewards are equal, the direct one's too, is not live and gets 0.
    (The tokens of the rationales learn from them centred once more, on the query's rationales alone: policy() in grpo_step.)
    """
    g = torch.cat((reason, direct[:, None].expand_as(reason)), dim=1)                         # (B, G)
    centred = g - g.mean(1, keepdim=True)
    live = centred.abs().amax(1) > 1e-6
    a = centred / (centred.square().mean().sqrt() + eps)
    return a[:, : reason.shape[1]] * live[:, None], live


def policy_loss(logp, old, advantage, denominator, low=0.2, high=0.28):
    """Token-level clipped loss. logp, old, advantage (n,), one entry per chosen token -> loss, share of clipped tokens.

    On-policy the ratio is 1 and the gradient is −advantage · ∇logp / denominator.
    """
    ratio = (logp - old).exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, clipped).sum() / denominator, (clipped < plain).float().mean() if len(logp) else logp.sum()


def decision_loss(logits, gain, beta=0.1):
    """logits (B, 2) of [direct, reason], gain (B,) = mean R_reason − R_direct -> mean cross-entropy to p* = σ(gain / β), the maximum of
    p·gain + β·entropy(p); its gradient in the logit of `reason` is (p − p*) / B."""
    best = (gain.detach() / beta).sigmoid()
    return -(torch.stack((1 - best, best), 1) * logits.log_softmax(-1)).sum(1).mean()


def averaged_loss(logp, old, advantage, logits, gain, group, n):
    """Ablation: one mean over the n decision and rationale tokens together, as plain GRPO would, where 1 of some 30 tokens is the decision.
    Unlike the two losses it has no clip, no entropy and no importance weight; rl_decision, rl_rationale and rl_beta are not read.

    Every rollout of the group brings its decision token: half of them chose to reason (advantage gain/2), half did not (−gain/2), written
    here per query and counted `group` times. The gain is not divided by a standard deviation.
    """
    decision = -(logits.log_softmax(-1) * torch.stack((-gain, gain), 1).detach() * 0.25).sum(1)                # half the rollouts each way, ±gain/2
    return (decision.sum() * group - ((logp - old).exp() * advantage).sum()) / n


def rollouts(model, reader, prompts, half, max_new, temperature, generator, budget=1 << 16):
    """G/2 sampled rationales per query, sharing the query's prefill -> branches [B][half] of ids, old logp [B][half], new and forced (B, half):
    how many tokens were sampled, and whether the end was forced on them. budget: of padded prompt tokens that are in memory together."""
    model.eval()
    n, found = max(1, budget // max(len(p["ids"]) + 1 for p in prompts)), []
    for at in range(0, len(prompts), n):
        batch = collate(prompts[at : at + n], reader, device=model.device)
        found.append(generate(model, batch, max_new, half, **reader.how, temperature=temperature, generator=generator))
    join = lambda key: sum((out[key] for out in found), [])
    return join("tokens"), join("logp"), *(np.concatenate([out[key] for out in found]) for key in ("new", "forced"))


def grpo_step(model, reader, prompts, targets, same, cfg, generator, actor=None):
    """One GRPO step on B queries, of which each rank has its share b; leaves gradients in the parameters.

    prompts [b] queries; targets [b] prompts of their targets; same (B, B) bool over the joined batch, True where two targets are equal;
    actor: who writes the rollouts, the model itself by default. cfg: rl_group, rl_max_new, rl_temperature, rl_price, rl_beta, rl_decision,
    rl_rationale, rl_nce, rl_one_loss, temperature, chunk_tokens.
    -> metrics of the joined batch; "sample" holds a rationale of this rank's query with the lowest mean reward.
    """
    b, B, half, t0 = len(prompts), len(same), cfg.rl_group // 2, time.time()
    tokens, old, new, forced = rollouts(actor or model, reader, prompts, half, cfg.rl_max_new, cfg.rl_temperature, generator, 4 * cfg.chunk_tokens)
    model.train()
    new, forced = (np.concatenate(gather_objects(x)) for x in (new, forced))                  # (B, half)
    first, device, n_vectors, seen = rank() * b, model.device, B * (1 + half), {"t1": time.time()}
    lengths = dict(query=[len(p["ids"]) + 1 + sum(map(len, t)) for p, t in zip(prompts, tokens)], target=[len(t["ids"]) + 1 for t in targets])
    # vectors are numbered: those of each query, the direct one first, then the targets
    number = lambda kind, i: range((first + i) * (1 + half), (first + i + 1) * (1 + half)) if kind == "query" else [n_vectors + first + i]
    chunks, order, fits = passes(lengths, number, cfg.chunk_tokens, reader.pad_to)
    p_reason, parts = torch.zeros(b, 1, device=device), dict(clip=0.0, gap=[0.0])

    def encode(chunk):
        kind, rows = chunk or ("nothing", [])
        if kind == "target":
            return direct_vectors(model, reader, [targets[i] for i in rows]), None
        batch = collate([prompts[i] for i in rows] or [NOTHING], reader, [tokens[i] for i in rows] or None, device)
        h = model(batch)
        q = pool(h, batch["ends"]).flatten(0, 1)                                              # (rows * (1+half), H): direct first
        logits = decision_logits(model, h, batch, reader)[: len(rows)]
        p_reason[rows, 0] = logits.detach().softmax(-1)[:, 1]
        return (q, lambda: policy(h, batch, rows, logits)) if rows else (q[:0], None)

    def loss_fn(v):
        """Rewards of all rollouts, and InfoNCE: the space must not drift."""
        q, t = v[order[:n_vectors]].view(B, 1 + half, -1), v[order[n_vectors:]]
        seen.update(score(q.detach(), t.detach(), same, new, forced, cfg), p=gather_rows(p_reason)[0][:, 0], t2=time.time())
        own, flat, each = torch.arange(B, device=device), q[:, 1:].reshape(B * half, -1), lambda x: x.repeat_interleave(half, 0)
        seen["nce"] = [info_nce(q[:, 0], t, own, cfg.temperature, same),
                       info_nce(flat, t, each(own), cfg.temperature, each(same), weights=each(seen["p"].clamp(min=1e-6)))]
        return cfg.rl_nce * (seen["nce"][0] + seen["p"].mean() * seen["nce"][1])             # rollouts by their importance weight here too

    def policy(h, batch, rows, logits):
        """The two losses of some rows: their sums over constants of the joined batch."""
        mine = first + np.array(rows)
        logp, row, branch = branch_logp(model, h, batch, reader, len(reader.prefix))
        chosen = sampled(new[mine], forced[mine], len(reader.close))
        logp, row, branch = logp[chosen], row[chosen], branch[chosen]
        was = torch.tensor([x for i in rows for g in range(half) for x in old[i][g]], device=device)
        adv, gain, p = seen["adv"][mine], seen["gain"][mine], seen["p"][mine]
        own = p[:, None] * (adv - adv.mean(1, keepdim=True))                                  # (rows, half): among the query's rationales
        token_loss, clip = policy_loss(logp, was, own[row, branch], B * half * cfg.rl_max_new)
        parts["clip"] += float(clip.detach()) * len(logp) / max(1, int(new.sum()))
        parts["gap"] += [float((logp.detach() - was).abs().max())] if len(was) else []
        if cfg.rl_one_loss:
            return averaged_loss(logp, was, adv[row, branch], logits, gain, 2 * half, new.sum() + 2 * B * half)
        return cfg.rl_decision * decision_loss(logits, gain, cfg.rl_beta) * len(rows) / B + cfg.rl_rationale * token_loss

    loss, extra = grad_cache(chunks, encode, loss_fn, fits)
    told, worst = gather_objects(parts), int(seen["reason"][first : first + b].mean(1).argmin())
    sample = dict(row=worst, rationale=reader.rationale_text(tokens[worst][0]), reward=float(seen["reason"][first + worst, 0]),
                  direct=float(seen["direct"][first + worst]))
    return dict(loss=loss + extra, **figures(**seen), clip_share=sum(x["clip"] for x in told), logp_gap=max(sum((x["gap"] for x in told), [])),
                tokens=float(new.mean()), closed_by_force=float(forced.mean()), nce_direct=float(seen["nce"][0].detach()),
                nce_reason=float(seen["nce"][1].detach()), s_generate=seen["t1"] - t0, s_score=seen["t2"] - seen["t1"],
                s_update=time.time() - seen["t2"], sample=sample)


def score(q, t, same, new, forced, cfg):
    """Rewards and what follows from them. q (B, 1+half, H), direct first; t (B, H) -> reason, adv (B, half); direct, gain, live (B,)."""
    B, device = len(q), q.device
    own, other = torch.arange(B, device=device), same & ~torch.eye(B, dtype=torch.bool, device=device)
    s = torch.einsum("bgh,ch->bgc", q, t) / cfg.temperature                                   # (B, 1+half, B): the batch's targets are C
    quality = s.masked_fill(other[:, None], float("-inf")).softmax(-1)[own, :, own]           # (B, 1+half): exp of embed.margin_score
    spent, ended = torch.from_numpy(new).to(device), torch.from_numpy(~forced).to(device)
    reason = rewards(quality[:, 1:], spent, ended, cfg.rl_price, cfg.rl_max_new)
    direct = rewards(quality[:, 0], torch.zeros(B, device=device), torch.ones(B, device=device), cfg.rl_price, cfg.rl_max_new)
    adv, live = advantages(reason, direct)
    return dict(reason=reason, direct=direct, adv=adv, live=live, gain=reason.mean(1) - direct)


def figures(p, reason, direct, gain, live, **_):
    """What `score` has found, and p = p_reason (B,), as the log's numbers: means over the joined batch."""
    entropy = -(p * p.clamp(min=1e-9).log() + (1 - p) * (1 - p).clamp(min=1e-9).log()).mean()
    return dict(reward=float((p * reason.mean(1) + (1 - p) * direct).mean()), reward_reason=float(reason.mean()), reward_direct=float(direct.mean()),
                reason_rate=float((p > 0.5).float().mean()), p_reason=float(p.mean()), decision_entropy=float(entropy),
                decision_right=float(((p > 0.5) == (gain > 0)).float().mean()), zero_variance=float((~live).float().mean()))


def sampled(new, forced, n_close):
    """Of branch_logp's tokens, in order: new[row, branch] that were sampled, then, where the end was forced, n_close that were not."""
    return torch.from_numpy(np.concatenate([np.arange(n + n_close * end) < n for n, end in zip(new.ravel(), forced.ravel())]))
