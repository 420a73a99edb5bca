"""What wrong TDPO, WPO and LD-DPO do, from the loss down to the blocks of the vocabulary."""

from __future__ import annotations

from fault import Fault

LOSS = "src/preftune/equations/token_level.py"
SCORES = "src/preftune/models/logprobs.py"
DISTRIBUTIONS = "src/preftune/models/distributions.py"
CONTRACT = "tests/claims/test_losses.py -k"
PULLS = "tests/equations/test_token_level.py"
DENSE = "tests/models/test_distributions.py"

FAULTS = [
    Fault(
        "tdpo1: the divergences change sides",
        LOSS,
        "return -logsigmoid(beta * (_gap(pairs) - (K_l - K_w)))",
        "return -logsigmoid(beta * (_gap(pairs) + (K_l - K_w)))",
        f"{CONTRACT} tdpo1",
    ),
    Fault(
        "tdpo2: the gradient through K_w is not stopped",
        LOSS,
        "(K_l - K_w.detach())",
        "(K_l - K_w)",
        f"{PULLS} -k analytic",
    ),
    Fault(
        "tdpo2: stops the gradient of the rejected side too",
        LOSS,
        "(K_l - K_w.detach())",
        "(K_l - K_w).detach()",
        f"{PULLS} -k analytic",
    ),
    Fault(
        "tdpo: KL(pi || pi_ref) instead of KL(pi_ref || pi)",
        SCORES,
        "self.hidden, self.weight, reference.hidden, reference.weight, **self",
        "reference.hidden, reference.weight, self.hidden, self.weight, **self",
        "tests/models/test_token_scores.py -k plain_logits",
    ),
    Fault(
        "tdpo: softmax().log() in place of a log-softmax, infinite where a probability underflows",
        DISTRIBUTIONS,
        "difference = u - z",
        "difference = (u - u_higher[:, None]).exp().log() + u_higher[:, None]"
        " - (z - z_higher[:, None]).exp().log() - z_higher[:, None]",
        f"{DENSE} -k far_apart",
    ),
    Fault(
        "tdpo: 0 * inf at entries that both models forbid",
        DISTRIBUTIONS,
        "difference.mul_(p).masked_fill_(p == 0, 0.0)",
        "difference.mul_(p)",
        f"{DENSE} -k forbids",
    ),
    Fault(
        "tdpo: the softcap is not differentiated",
        DISTRIBUTIONS,
        "yield low, z if slope is None else z.mul_(slope), room",
        "yield low, z, room",
        f"{DENSE} -k definition",
    ),
    Fault(
        "tdpo: two rounded logsumexps are subtracted",
        DISTRIBUTIONS,
        "gap / ref_total + (highest - ref_highest) + (total.log() - ref_total.log())",
        "gap / ref_total + lse - ref_lse",
        f"{DENSE} -k level_of_the_logits",
    ),
    Fault(
        "wpo: the weight is differentiated",
        LOSS,
        "(A_w + A_l).detach()",
        "(A_w + A_l)",
        f"{PULLS} -k alignment",
    ),
    Fault(
        "wpo: the product is not bounded",
        LOSS,
        ".detach().clamp(max=0.0).exp()",
        ".detach().exp()",
        f"{CONTRACT} wpo",
    ),
    Fault(
        "wpo: the factors are bounded, not their product",
        LOSS,
        "(A_w + A_l).detach().clamp(max=0.0).exp()",
        "(A_w.clamp(max=0.0) + A_l.clamp(max=0.0)).detach().exp()",
        f"{CONTRACT} wpo",
    ),
    Fault(
        "wpo: alignments are summed over a response, so that long ones weigh nothing",
        "src/preftune/tensors.py",
        "per_response(alignment_C.detach()) / length_R",
        "per_response(alignment_C.detach())",
        f"{PULLS} -k means_over_tokens",
    ),
    Fault(
        "wpo: no normalisation by sum_v pi(v)^2",
        DISTRIBUTIONS,
        "(total.log() - squares.log())",
        "(-total.log())",
        f"{DENSE} -k alignment",
    ),
    Fault(
        "ld_dpo: the policy is discounted, the reference is not",
        "src/preftune/tensors.py",
        "token_log_ratio=ratio_C if keep_tokens else None",
        "token_log_ratio=logps_C if keep_tokens else None",
        f"{PULLS} -k fresh",
    ),
    Fault(
        "ld_dpo: only the chosen response is discounted",
        LOSS,
        "(1 - alpha) * (shared_w - shared_l)",
        "(1 - alpha) * (shared_w - pairs.rejected_log_ratio)",
        f"{CONTRACT} ld_dpo",
    ),
    Fault(
        "ld_dpo: alpha counts what is shared, not what is beyond",
        LOSS,
        "alpha * _gap(pairs) + (1 - alpha) * (shared_w - shared_l)",
        "(1 - alpha) * _gap(pairs) + alpha * (shared_w - shared_l)",
        f"{CONTRACT} ld_dpo",
    ),
]
"""Each must be noticed by the tests it names."""
