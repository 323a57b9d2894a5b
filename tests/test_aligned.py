"""The aligned start against second moments in plain float64 and a general eigenproblem."""

import pytest
import torch

from conftest import make_model
from generator import rms_norm
from extras import aligned


def plain_moments(base, l, batches):
    """Rows h_{i+1}, z_i and e_{i+1} of a block and its down_proj, i >= 1, in float64."""
    ids, seen = torch.cat(batches), []
    hook = base.model.layers[l].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    H = base.model(ids, output_hidden_states=True).hidden_states[l]
    hook.remove()
    rows = rms_norm(H)[:, 2:], seen[0][:, 1:-1], base.get_input_embeddings()(ids[:, 2:])
    return [x.flatten(0, 1).double() for x in rows]


@torch.no_grad()
@pytest.mark.parametrize("memory", [4e9, 1])
def test_against_the_eigenproblem(monkeypatch, memory):
    """K_h solves C_hx C_xx^-1 C_xh k = rho^2 C_hh k; one block a pass (MEMORY = 1) gives the same."""
    monkeypatch.setattr(aligned, "MEMORY", memory)
    model = make_model(targets=["down_proj"], d_r=8)
    batches = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0)).split(2)
    random = [p.clone() for p in model.generator.layers[2].parameters()]
    aligned.aligned_start(model, batches)
    layer, (h, z, e) = model.generator.layers[2], plain_moments(model.base, 2, batches)
    for keys, x in ((layer.B1.T, z), (layer.A2, e)):
        u, v = h.mean(0) / h.mean(0).norm(), x.mean(0) / x.mean(0).norm()
        P, R = torch.eye(64) - torch.outer(u, u), torch.eye(len(v)) - torch.outer(v, v)
        C_hh, C_xx, C_hx = P @ (h.T @ h / len(h)) @ P, R @ (x.T @ x / len(x)) @ R, P @ (h.T @ x / len(h)) @ R
        C_hh, C_xx = (C + aligned.RIDGE * C.trace() / len(C) * torch.eye(len(C)) for C in (C_hh, C_xx))
        M = torch.linalg.solve(C_hh, C_hx @ torch.linalg.solve(C_xx, C_hx.T))
        square = torch.linalg.eigvals(M).real.sort(descending=True).values[:8]      # rho^2
        for k, want in zip(keys.double(), square):
            torch.testing.assert_close(P @ M @ k, want * k, atol=2e-3 * float((want * k).norm()), rtol=0)
        energy = ((keys.double() @ h.T) ** 2).sum(0).mean()
        torch.testing.assert_close(energy, h.square().sum(1).mean() * 8 / (3 * 64), rtol=1e-4, atol=0)
    energy = ((layer.B2.double() @ z.T) ** 2).sum(0).mean()
    want = aligned.QUERY_SCALE**2 * z.square().sum(1).mean() * 8 / (3 * z.shape[1])
    torch.testing.assert_close(energy, want, rtol=1e-4, atol=0)
    names = [name for name, p in layer.named_parameters() for q in random if p.shape == q.shape and torch.equal(p, q)]
    assert set(names) >= {"A1", "g"} and not {"A2", "B1", "B2"} & set(names)


@torch.no_grad()
def test_wider_than_the_residual_stream_and_deterministic():
    """Rows beyond the canonical directions keep their random start; the same text gives the same start."""
    batches = [torch.randint(0, 256, (4, 30), generator=torch.Generator().manual_seed(1))]
    models = [make_model(targets=["o_proj", "q_proj"], d_r=70) for _ in range(2)]
    before = models[0].generator.layers[1].A2.clone()
    for model in models:
        aligned.aligned_start(model, batches)
    for p, q in zip(*(model.generator.parameters() for model in models)):
        assert torch.equal(p, q) and p.isfinite().all()
    same = (models[0].generator.layers[1].A2 == before).all(1)
    assert same[64:].all() and not same[:64].any()
