"""theory.policy_gradient: the gradient of J on an enumerable world, and what PPO and RLOO give of it on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.equations.kl import k3, kl_divergence
from preftune.equations.optimum import frontier_reward, log_partition
from preftune.equations.policy_gradient import kl_rewards, policy_gradient_loss
from preftune.errors import ConfigError, NotFinite
from preftune.models.fresh import tiny_llama
from preftune.theory.enumerable import Completions, enumerate_completions
from preftune.theory.policy_gradient import (
    Problem,
    exact_gradient_policy,
    exact_objective,
    expected_ppo_loss,
    expected_rloo_loss,
)
from preftune.worlds.enumerable import EOS_ID, random_world

EOS = 3  # not the last id: symbols 0, 1, 2, 4
LIMIT = 3
PROMPT = [0, 4]
BETA = 0.7


def perturbed(model: Any, seed: int, scale: float) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=g, dtype=weight.dtype)
    return model


def llama(seed: int = 0, scale: float = 0.3) -> Any:
    model = tiny_llama(5, hidden=16, layers=1, heads=2, positions=8, bos_id=EOS, eos_id=EOS).double()
    return perturbed(model, seed, scale)


def gpt2(seed: int = 0, scale: float = 0.3) -> Any:
    """With dropout that is active until it is switched off."""
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=EOS, eos_token_id=EOS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().train()
    return perturbed(model, seed, scale)


def enumerated(model: Any, prompts: list[list[int]]) -> Completions:
    return enumerate_completions(model, prompts, eos_id=EOS, max_tokens=LIMIT)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(model: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def left_by(model: Any) -> Tensor:
    """What a backward pass left in the weights, taken away."""
    grads = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return grads


def same(estimate: Tensor, exact: Tensor, tolerance: float) -> None:
    """Direction and length agree."""
    assert float(torch.cosine_similarity(estimate, exact, 0)) == pytest.approx(1, abs=tolerance)
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1, abs=tolerance)


class Case:
    """One prompt of a small world: policy, reference, a reward for every completion, and the exact gradient of -J."""

    def __init__(self, make: Callable[..., Any], *, apart: float = 0.3) -> None:
        self.tolerance = 1e-8 if make is gpt2 else 1e-6  # Llama's own norms compute in float32
        self.model, reference = make(), perturbed(make(), 7, apart)
        self.found = enumerated(self.model, [PROMPT])
        self.tokens = self.found.tokens
        self.mask = torch.arange(LIMIT) < self.found.lengths[:, None]
        with torch.no_grad():
            self.ref_token_logps = self.token_logps(reference)
            self.ref_logps = enumerated(reference, [PROMPT]).logps
        self.score = 2 * draws(1, len(self.tokens))
        problem = Problem([PROMPT], self.score, self.ref_logps, BETA, EOS, LIMIT)
        self.outcome = exact_objective(self.model, problem, backward=True)
        self.exact = left_by(self.model)

    def token_logps(self, model: Any) -> Tensor:
        """[M, T] by one plain forward over every completion, no cache and no tree."""
        model.eval()
        rows = torch.cat([torch.tensor([PROMPT]).expand(len(self.tokens), -1), self.tokens], 1)
        law = torch.log_softmax(model(input_ids=rows).logits[:, len(PROMPT) - 1 : -1], -1)
        return law.gather(-1, self.tokens[..., None])[..., 0]

    def state_values(self, seed: int) -> Tensor:
        """[M, T] an arbitrary V(s_t): one number for every prefix, whatever comes behind it."""
        code = torch.zeros(len(self.tokens), dtype=torch.int64)
        codes = [code]
        for t in range(LIMIT - 1):
            code = code * 6 + self.tokens[:, t] + 1
            codes.append(code)
        return 3 * draws(seed, 6**LIMIT)[torch.stack(codes, -1)]

    def ppo(self, values: Tensor, **settings: float) -> Tensor:
        logps = self.token_logps(self.model)
        loss = expected_ppo_loss(logps, self.ref_token_logps, self.mask, self.score, values, beta=BETA, **settings)
        return gradient(self.model, loss)

    def reinforce(self, returns: Tensor) -> Tensor:
        (logps,) = enumerated(self.model, [PROMPT]).logps
        return gradient(self.model, (logps.detach().exp() * policy_gradient_loss(logps, returns)).sum())


@pytest.fixture(scope="module", params=[llama, gpt2])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_objective_is_the_sum_written_out(case: Case) -> None:
    """J, reward and KL by a sum over completions, each scored in a row of its own."""
    with torch.no_grad():
        token_logps = torch.where(case.mask, case.token_logps(case.model), 0.0)
        log_ratio = token_logps.sum(-1) - torch.where(case.mask, case.ref_token_logps, 0.0).sum(-1)
        law = token_logps.sum(-1).exp()
    assert case.outcome.reward == pytest.approx(float((law * case.score).sum()), abs=case.tolerance)
    assert case.outcome.kl == pytest.approx(float((law * log_ratio).sum()), abs=case.tolerance)
    assert case.outcome.objective == pytest.approx(case.outcome.reward - BETA * case.outcome.kl, abs=1e-12)


def test_the_gradient_is_the_slope_of_the_objective() -> None:
    """Finite differences of J along a random direction."""
    case = Case(gpt2)
    step = draws(5, len(case.exact))
    problem, moved = Problem([PROMPT], case.score, case.ref_logps, BETA, EOS, LIMIT), []
    weights = torch.nn.utils.parameters_to_vector(case.model.parameters()).detach()
    for way in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(weights + way * step, case.model.parameters())
        moved.append(exact_objective(case.model, problem).objective)
    torch.nn.utils.vector_to_parameters(weights, case.model.parameters())
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(-float(case.exact @ step), rel=1e-6)


def test_rloo_is_the_exact_gradient_on_average(case: Case) -> None:
    """Over all ordered pairs of completions, the expected RLOO gradient with k = 2 is that of -J."""
    (logps,) = enumerated(case.model, [PROMPT]).logps
    with torch.no_grad():
        rewards = kl_rewards(case.token_logps(case.model), case.ref_token_logps, case.mask, case.score, BETA)
    same(gradient(case.model, expected_rloo_loss(logps, rewards.sum(-1))), case.exact, case.tolerance)


def test_ppo_is_the_exact_gradient_on_average_whatever_the_critic_says(case: Case) -> None:
    """At ratio 1, with gamma = lambda = 1, V of the state alone: 0, arbitrary, or another arbitrary one."""
    for values in (torch.zeros(case.mask.shape, dtype=torch.float64), case.state_values(2), case.state_values(3)):
        same(case.ppo(values), case.exact, case.tolerance)


def test_what_biases_ppo(case: Case) -> None:
    """lambda < 1 with a wrong V, gamma < 1, and a V that has seen the token it judges: all visibly off."""
    wrong = case.state_values(2)
    for estimate in (
        case.ppo(wrong, lam=0.5),
        case.ppo(wrong * 0, gamma=0.8),
        case.ppo(3 * draws(4, *case.mask.shape)),
    ):
        assert float((estimate - case.exact).norm() / case.exact.norm()) > 0.05


def test_the_true_critic_takes_the_bias_of_lambda_away(case: Case) -> None:
    """With V(s) = E of what is still to come, lambda = 0 is exact as well: lambda trades only errors of V."""
    with torch.no_grad():
        logps = torch.where(case.mask, case.token_logps(case.model), 0.0)
        to_come = kl_rewards(logps, case.ref_token_logps, case.mask, case.score, BETA).flip(-1).cumsum(-1).flip(-1)
    values = torch.zeros_like(to_come)
    for t in range(LIMIT):
        there = case.mask[:, t]
        prefixes = [tuple(row[:t]) for row in case.tokens.tolist()]
        state = torch.tensor([prefixes.index(prefix) for prefix in prefixes])
        share = torch.where(there, logps[:, t:].sum(-1).exp(), 0.0)
        mean = torch.zeros(len(there), dtype=torch.float64).index_add(0, state, share * to_come[:, t])
        values[:, t] = mean[state]
    same(case.ppo(values, lam=0.0), case.exact, case.tolerance)
    same(case.ppo(values, lam=0.95), case.exact, case.tolerance)


def test_the_penalty_in_the_reward_is_exact_by_k1_and_none_by_k3() -> None:
    """As rewards: k1 gives the gradient of KL(pi || ref), k3 at most a tenth of it close to the reference."""
    near = Case(gpt2, apart=0.005)
    (logps,) = enumerated(near.model, [PROMPT]).logps
    exact = gradient(near.model, kl_divergence(logps, near.ref_logps[0]))
    log_ratio = (logps - near.ref_logps[0]).detach()
    same(near.reinforce(-log_ratio), exact, near.tolerance)
    assert 0 < float(kl_divergence(logps.detach(), near.ref_logps[0])) < 0.01
    assert float(near.reinforce(-k3(log_ratio)).norm() / exact.norm()) < 0.1


def test_a_reward_that_tells_nothing_moves_nothing() -> None:
    """One score for all, at the reference: no gradient, neither exactly nor of what PPO expects under any critic."""
    case = Case(gpt2)
    constant = torch.full_like(case.score, 5.0)
    problem = Problem([PROMPT], constant, enumerated(case.model, [PROMPT]).logps.detach(), BETA, EOS, LIMIT)
    exact_objective(case.model, problem, backward=True)
    assert float(left_by(case.model).norm()) < 1e-12
    logps = case.token_logps(case.model)
    loss = expected_ppo_loss(logps, logps.detach(), case.mask, constant, case.state_values(2), beta=BETA)
    assert float(gradient(case.model, loss).norm()) < 1e-12


def test_means_over_prompts_do_not_depend_on_their_being_together() -> None:
    """J, its gradient and a reward shared by all prompts: the mean of the prompts taken alone."""
    model, reference, prompts = gpt2(), gpt2(seed=3), [[0, 4], [2], [EOS, 1, 1]]
    with torch.no_grad():
        found = enumerated(reference, prompts)
    score = draws(1, found.logps.shape[1])
    together = exact_objective(model, Problem(prompts, score, found.logps, BETA, EOS, LIMIT), backward=True)
    gradient_together = left_by(model)
    alone = []
    for x in range(3):
        problem = Problem(prompts[x : x + 1], score[None], found.logps[x : x + 1], BETA, EOS, LIMIT)
        alone.append(exact_objective(model, problem, backward=True))
    assert together.objective == pytest.approx(sum(one.objective for one in alone) / 3, abs=1e-12)
    torch.testing.assert_close(gradient_together, left_by(model) / 3, rtol=0, atol=1e-12)


def world_problem(beta: float, seed: int = 0) -> tuple[Any, Problem]:
    """A fresh transformer as reference and start; 4 prompts, 73 completions each."""
    world, model = random_world(seed, max_tokens=2), tiny_llama(9, hidden=32, layers=2, bos_id=EOS_ID, eos_id=EOS_ID)
    prompts = world.prompts[::16]
    ids = [world.prompt_ids(prompt) for prompt in prompts]
    with torch.no_grad():
        found = enumerate_completions(model, ids, eos_id=EOS_ID, max_tokens=2)
    return model, Problem(ids, world.rewards(prompts, found.tokens), found.logps, beta, EOS_ID, 2)


def test_exact_gradients_reach_the_frontier() -> None:
    """beta = 1: from the reference, J 0.65 below its maximum, to within 0.02 of the frontier and of beta log Z."""
    model, problem = world_problem(beta=1.0)
    trace = exact_gradient_policy(model, problem, steps=80, lr=3e-3)
    best = float(log_partition(problem.ref_logps, problem.rewards, 1.0).mean())
    end = trace[-1]
    assert len(trace) == 81 and trace[0].kl == 0 and best - trace[0].objective > 0.6
    assert 0 <= frontier_reward(problem.ref_logps, problem.rewards, end.kl) - end.reward < 0.02
    assert 0 <= best - end.objective < 0.02
    assert all(weight.grad is None for weight in model.parameters()) and not model.training


def test_an_infinite_price_of_kl_holds_the_policy_at_the_reference() -> None:
    """beta = 10^4: a policy that was pushed away comes back, and one at the reference stays, rewards or not."""
    model, problem = world_problem(beta=1e4)
    assert exact_gradient_policy(model, problem, steps=20, lr=1e-4)[-1].kl < 1e-4
    trace = exact_gradient_policy(perturbed(model, 3, 0.05), problem, steps=80, lr=3e-3)
    assert trace[0].kl > 0.03 and trace[-1].kl < 0.001


def test_what_cannot_be_trained_is_refused() -> None:
    """Other shapes, rewards that are not finite, no steps, no rate, a limit that is another, weights that are NaN."""
    model = llama()
    with torch.no_grad():
        found = enumerated(model, [PROMPT])
    problem = Problem([PROMPT], draws(1, 85), found.logps, 1.0, EOS, LIMIT)
    for steps, lr in ((0, 1e-3), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ConfigError, match="steps="):
            exact_gradient_policy(model, problem, steps=steps, lr=lr)
    for rewards, ref_logps, limit, said in (
        (draws(1, 84), found.logps, LIMIT, r"not \[1, 85\] and \[84\]"),
        (draws(1, 85), found.logps[0], LIMIT, "ref_logps"),
        (torch.full((85,), torch.inf), found.logps, LIMIT, "85 rewards are not finite"),
        (draws(1, 85), found.logps, 2, "has 21 completions"),
    ):
        with pytest.raises(ConfigError, match=said):
            exact_objective(model, Problem([PROMPT], rewards, ref_logps, 1.0, EOS, limit))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NotFinite, match="at step 0"):
        exact_gradient_policy(model, problem, steps=1, lr=1e-3)
