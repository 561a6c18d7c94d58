"""
GRPO by hand: learn what to write, and whether to write at all, with a price on latency.

The idea. Per query a group of G rollouts, half forced to reason and half direct, so that both actions are always seen. The direct branch
is deterministic: it is computed once and counts G/2 times. A rollout's reward says how well the embedding after it finds the target:
    R = p(t | q, r) + format − price · tokens / T_max       p = exp m(q, r) in [0, 1]: softmax over the batch's targets at temperature 0.02;
                                                            format = 0.1 when the rationale closed itself (a direct answer is well formed);
                                                            tokens are those generated: charged, because seconds are not reproducible
Two losses, never averaged together (one decision token among 30 would carry 3 % of a token mean, and collapse):
    decision   J(q) = p_reason · mean R_reason + (1 − p_reason) · R_direct, hence dJ/dp = mean R_reason − R_direct in closed form: no noise
               from sampling the action, no importance weight for the forced draw
    rationale  token-level clipped policy gradient on the tokens that were chosen, </think> among them

Which GRPO this is, in six lines:
    advantage          R − group mean (the G/2 direct ones count); the reward is summed before it is normalised
    standard deviation of the whole batch, not of the group: a group's own would let a tiny price decide wherever quality ties
    reduction          token level over a constant denominator (rollouts x T_max): no length bias
    clip / KL          ratio clipped to 0.8 ... 1.28; no reference model, no KL
    stop token         </think> is trained; forced tokens (the opening, a closing after running out, the tail) are not
    deleted            value network, several epochs per rollout, group-wise std, advantage for embeddings (these learn by InfoNCE, beside)
Groups of zero variance are dropped. Picture tokens are banned at sampling and in the log-probability alike.

How to run: stage `rl` of train.py. The log names what tells a live run from a dead one: reward, reason rate, entropy of the decision,
zero-variance share, clip share, |logp_rollout − logp_train|, tokens, seconds of generate/score/update, and one sample.

Left out: off-policy updates, asynchronous rollouts, group size by difficulty.
Source: design.md section 5; the choices and where they come from: DAPO (2503.14476), Dr.GRPO (2503.20783), Lite PPO (2508.08221).
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

from embed import branch_logp, collate, decision_logits, info_nce, pool
from model import generate


def rewards(quality, tokens, closed_itself, price, t_max, bonus=0.1):
    """R of every rollout. quality in [0, 1], tokens (generated), closed_itself (bool), all of one shape."""
    return quality + bonus * closed_itself.float() - price * tokens.float() / t_max


def advantages(reason, direct, eps=1e-4):
    """reason (B, G/2) and direct (B,) rewards -> advantages (B, G/2) of the reasoned rollouts and live (B,) bool.

    The direct rollout stands for G/2 equal ones: the group mean is that of all G. Divided by the std over all rollouts of the batch.
    Groups without variance (every rollout got the same reward) are not live and get 0.
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


def decision_loss(logits, gain):
    """logits (B, 2) of [direct, reason], gain (B,) = mean R_reason − R_direct -> −J averaged: its gradient is −p(1−p)·gain."""
    return -(logits.softmax(-1)[:, 1] * gain.detach()).mean()


def averaged_loss(logp, old, advantage, logits, gain, n_rollouts):
    """Ablation: one mean over decision and rationale tokens together, as plain GRPO would, where 1 of some 30 tokens is the decision.

    Every rollout brings its decision token: half of them chose to reason (advantage gain/2), half did not (−gain/2), written here per
    query and counted n_rollouts times in all. The gain is not divided by a standard deviation.
    """
    decision = -(logits.log_softmax(-1) * torch.stack((-gain, gain), 1).detach() * 0.25).sum(1)                # half the rollouts each way, ±gain/2
    tokens = -(logp - old).exp() * advantage
    return (decision.sum() * n_rollouts / len(logits) + tokens.sum()) / (len(tokens) + n_rollouts)


def rollouts(model, reader, prompts, half, max_new, temperature, generator):
    """G/2 sampled rationales per query, sharing the query's prefill -> branches [B][half] of ids, old logp [B][half], new and closed (B, half)."""
    model.eval()
    batch = collate(prompts, reader, device=model.device)
    out = generate(model, batch, max_new, G=half, prefix=reader.prefix, stop=(reader.unthink,), tail=reader.tail, close=reader.close,
                   ban=reader.ban, temperature=temperature, generator=generator)
    return out["tokens"], out["logp"], out["new"], out["closed"]


def grpo_step(model, reader, prompts, targets, same, cfg, generator, encode_targets):
    """One GRPO step on B queries; leaves gradients in the parameters.

    prompts [B] queries; targets [B] prompts of their targets; same (B, B) bool, True where two targets are equal; encode_targets(prompts)
    -> (B, H) unit vectors with gradient. cfg: rl_group, rl_max_new, rl_temperature, rl_price, rl_nce, rl_one_loss, temperature.
    -> metrics dict; "sample" holds one rationale with its reward.
    """
    B, half, t0 = len(prompts), cfg.rl_group // 2, time.time()
    tokens, old, new, closed = rollouts(model, reader, prompts, half, cfg.rl_max_new, cfg.rl_temperature, generator)
    t1 = time.time()
    model.train()
    batch = collate(prompts, reader, tokens, model.device)
    h = model(batch)
    q = pool(h, batch["ends"])                                                                # (B, 1+half, H): direct first
    t = encode_targets(targets)
    device, own = q.device, torch.arange(B, device=q.device)
    with torch.no_grad():
        s = torch.einsum("bgh,ch->bgc", q, t) / cfg.temperature                               # (B, 1+half, B): the batch's targets are C
        other = same & ~torch.eye(B, dtype=torch.bool, device=device)
        quality = s.masked_fill(other[:, None], float("-inf")).softmax(-1)[own, :, own]       # (B, 1+half)
        spent = torch.from_numpy(new).to(device)
        reason = rewards(quality[:, 1:], spent, torch.from_numpy(~closed).to(device), cfg.rl_price, cfg.rl_max_new)
        direct = rewards(quality[:, 0], torch.zeros(B, device=device), torch.ones(B, device=device), cfg.rl_price, cfg.rl_max_new)
        adv, live = advantages(reason, direct)
        gain = reason.mean(1) - direct
    t2 = time.time()
    logp, row, branch = branch_logp(model, h, batch, reader, len(reader.prefix))
    chosen = chosen_tokens(row, branch, new)                                                  # leaves out closings that were forced
    logp, row, branch = logp[chosen], row[chosen], branch[chosen]
    was = torch.tensor([x for b in range(B) for g in range(half) for x in old[b][g]], device=device)
    logits = decision_logits(model, h, batch, reader)
    token_loss, clip = policy_loss(logp, was, adv[row, branch], B * half * cfg.rl_max_new)
    act_loss = decision_loss(logits, gain)
    if cfg.rl_one_loss:
        policy = averaged_loss(logp, was, adv[row, branch], logits, gain, 2 * B * half)
    else:
        policy = cfg.rl_decision * act_loss + cfg.rl_rationale * token_loss
    flat = q[:, 1:].reshape(B * half, -1)                                                     # the space must not drift: InfoNCE goes on
    nce = info_nce(q[:, 0], t, own, cfg.temperature, same)
    nce_r = info_nce(flat, t, own.repeat_interleave(half), cfg.temperature, same.repeat_interleave(half, 0))
    (policy + cfg.rl_nce * (nce + nce_r)).backward()
    p = logits.detach().softmax(-1)[:, 1]
    entropy = -(p * p.clamp(min=1e-9).log() + (1 - p) * (1 - p).clamp(min=1e-9).log()).mean()
    worst = int(reason.mean(1).argmin())
    return dict(reward=float((p * reason.mean(1) + (1 - p) * direct).mean()), reward_reason=float(reason.mean()), reward_direct=float(direct.mean()),
                reason_rate=float((p > 0.5).float().mean()), p_reason=float(p.mean()), decision_entropy=float(entropy),
                decision_right=float(((p > 0.5) == (gain > 0)).float().mean()), zero_variance=float((~live).float().mean()), clip_share=float(clip.detach()),
                logp_gap=float((logp.detach() - was).abs().max()) if len(was) else 0.0, tokens=float(new.mean()), closed_by_force=float(closed.mean()),
                nce_direct=float(nce.detach()), nce_reason=float(nce_r.detach()), s_generate=t1 - t0, s_score=t2 - t1, s_update=time.time() - t2,
                sample=dict(row=worst, rationale=reader.rationale_text(tokens[worst][0]), reward=float(reason[worst, 0]), direct=float(direct[worst])))


def chosen_tokens(row, branch, new):
    """Of branch_logp's tokens (row, branch), in order, the first new[row, branch] of each rollout: those that were sampled -> bool (n,)."""
    row, branch = row.cpu().numpy(), branch.cpu().numpy()
    flat = row * new.shape[1] + branch
    start = np.r_[True, flat[1:] != flat[:-1]] if len(flat) else np.zeros(0, bool)
    nth = np.arange(len(flat)) - np.maximum.accumulate(np.where(start, np.arange(len(flat)), 0))
    return torch.from_numpy(nth < new[row, branch])
