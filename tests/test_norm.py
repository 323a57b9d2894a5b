"""norm(S), eq. 7 and 8: values and gradients against float64, plain formulas and finite differences."""

import math
from types import SimpleNamespace

import pytest
import torch

from generator import norm
from support.fast import product_dtype, sketch, svd_norm


def matrix(d, spectrum, seed=0):
    """A float64 (d, d) matrix with those singular values and random directions."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.zeros(d, dtype=torch.float64)
    sigma[:len(spectrum)] = torch.as_tensor(spectrum, dtype=torch.float64)
    return U @ torch.diag(sigma) @ V.T


def falling(condition, n):
    """n singular values from 1e4 to 1e4 / condition."""
    return torch.logspace(4, 4 - math.log10(condition), n, dtype=torch.float64)


def svd_of_range(S, rank):
    """U, sigma, V_T of Q Q^T S in float64, Q the range finder of svd_norm by Householder QR."""
    Q = torch.linalg.qr(S @ sketch(len(S), rank, S.device).double()).Q
    Q = torch.linalg.qr(S @ torch.linalg.qr(S.T @ Q).Q).Q
    U, sigma, V_T = torch.linalg.svd(Q.T @ S, full_matrices=False)
    return Q @ U, sigma, V_T


def reference(S, rank, damping, function, lam=None):
    """The formula step by step in float64: sigma / sqrt(sigma^2 + lambda^2)."""
    U, sigma, V_T = torch.linalg.svd(S) if function is norm else svd_of_range(S, rank)
    U, sigma, V_T = U[:, :rank], sigma[:rank], V_T[:rank]
    if lam is None:
        lam = damping * sigma[0]
    f = torch.where(sigma > 1e-6 * sigma[0], sigma / torch.sqrt(sigma**2 + lam**2), 0)
    return U @ torch.diag(f) @ V_T


def value_and_gradient(function, S, rank, damping):
    """norm(S) and the gradient by S of its product with a fixed random matrix, both in float64."""
    S = S.clone().requires_grad_()
    left, right = function(S, rank, damping)
    N = left.double() @ right.double()
    N.backward(torch.randn(S.shape, generator=torch.Generator().manual_seed(1)).double())
    return N.detach(), S.grad.double()


def error(got, want):
    return (got - want).norm() / want.norm()


@pytest.mark.parametrize("function, damping", [(svd_norm, 1e-2), (svd_norm, 1e-3), (svd_norm, 0.0), (norm, 1e-2),
                                               (norm, 0.0)])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
@torch.no_grad()
def test_value_in_fp32(condition, damping, function):
    d, r = 64, 16
    spectrum = falling(condition, r)
    tail = spectrum[-1] * torch.logspace(-0.5, -3, d - r, dtype=torch.float64)
    S = matrix(d, torch.cat([spectrum, tail])).float()
    U, V = function(S, r, damping)
    assert error(U.double() @ V.double(), reference(S.double(), r, damping, function)) < 1e-3


SHORT, FULL = ([5, 4, 3, 2, 1], [3, 3, 3, 1, 1], [2] * 8), list(range(24, 0, -1))


@pytest.mark.parametrize("function, spectrum, rank, damping",
                         [(svd_norm, spectrum, 8, damping) for spectrum in SHORT for damping in (1e-2, 1e-3)]
                         + [(svd_norm, FULL, 24, 1e-2), (norm, FULL, 8, 1e-2), (norm, FULL, 8, 0.0)])
def test_gradient_against_finite_differences(function, spectrum, rank, damping):
    """Exact wherever rank(S) <= r, ties included, along changes that keep the rank, so that norm is differentiable.
    torch.linalg.svd's gradient needs sigma that are all different."""
    S = matrix(24, spectrum).requires_grad_()
    G = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    U, V = function(S, rank, damping)
    (U @ V * G).sum().backward()
    lam = damping * max(spectrum)
    for seed in range(4):
        random = torch.Generator().manual_seed(10 + seed)
        L, R = (torch.randn(24, 24, dtype=torch.float64, generator=random) for _ in range(2))
        with torch.no_grad():
            step = 1e-6 * (L @ S + S @ R)
            change = reference(S + step, rank, 0, function, lam) - reference(S - step, rank, 0, function, lam)
            numeric = (change * G).sum() / 2
            analytic = (S.grad * step).sum()
        assert abs(numeric - analytic) < 1e-4 * step.norm() * S.grad.norm()


@pytest.mark.parametrize("damping", [1e-2, 1e-3, 0.0])
@pytest.mark.parametrize("S", [torch.zeros(24, 24), torch.eye(24), matrix(24, [5, 3, 1]).float(),
                               matrix(24, [4, 4, 4, 4]).float()], ids=["zero", "identity", "three tokens", "ties"])
def test_corners(S, damping):
    """Null directions give 0, not noise; values and gradients are finite; two calls agree to the bit."""
    directions = min(8, torch.linalg.matrix_rank(S).item())
    for function in (svd_norm, norm):
        sigma = torch.linalg.svdvals(torch.matmul(*function(S, 8, damping)))
        assert (sigma[:directions] > 0.95).all() and (sigma[directions:] < 1e-4).all()
    once = svd_norm(S, 8, damping)
    torch.rand(3)                                                               # the global generator must not matter
    assert all(torch.equal(*pair) for pair in zip(once, svd_norm(S, 8, damping)))
    if damping > 0:
        assert value_and_gradient(svd_norm, S, 8, damping)[1].isfinite().all()
    else:
        with pytest.raises(ValueError, match="use svd-exact"):
            svd_norm(S.clone().requires_grad_(), 8, damping)


@pytest.mark.parametrize("damping", [1e-2, 1e-3])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_gradient_in_fp32(condition, damping):
    """In fp32 against the Daleckii-Krein formula in float64 (spec of norm's gradient), contexts shorter and longer than
    r: the singular values of a sketch beyond r count as 0."""
    d, r = 64, 16
    for tail in (False, True):
        spectrum = falling(condition, r if tail else r - 4)
        beyond = spectrum[-1] * torch.logspace(-0.5, -3, d - r, dtype=torch.float64)
        S = matrix(d, torch.cat([spectrum, beyond]) if tail else spectrum).float()
        G = torch.randn(d, d, generator=torch.Generator().manual_seed(1)).double()
        want = daleckii_krein(S.double(), r, damping, G)
        assert error(value_and_gradient(svd_norm, S, r, damping)[1], want) < 1e-2
        assert error(value_and_gradient(svd_norm, S.double(), r, damping)[1], want) < 1e-4


def daleckii_krein(S, r, damping, G):
    """The derivative of the spectral function of Q Q^T S by its singular vectors, in float64."""
    U, sigma, V_T = svd_of_range(S, r)
    keep = sigma > 1e-6 * sigma[0]
    U, sigma, V = U[:, keep], sigma[keep], V_T[keep].T
    w = torch.sqrt(sigma**2 + (damping * sigma[0]) ** 2)
    f = sigma / w
    C = U.T @ G @ V
    gap = sigma[:, None] - sigma
    slope = (damping * sigma[0]) ** 2 / w**3                                    # f', on ties
    tie = gap.abs() < 1e-9 * sigma[0]
    D1 = torch.where(tie, slope.expand_as(gap), (f[:, None] - f) / torch.where(tie, 1, gap))
    D2 = (f[:, None] + f) / (sigma[:, None] + sigma)
    inside = U @ ((C + C.T) / 2 * D1 + (C - C.T) / 2 * D2) @ V.T
    left = (G @ V - U @ C) / w @ V.T
    right = U @ ((U.T @ G - C @ V.T) / w[:, None])
    return inside + left + right


def test_gradient_of_a_large_S():
    """norm(c S) = norm(S): its gradient by S is that of c S times c. c = 1e12 makes sigma^4 overflow fp32."""
    S, c = matrix(64, falling(1e2, 12)).float(), 1e12
    got, want = value_and_gradient(svd_norm, c * S, 16, 1e-2), value_and_gradient(svd_norm, S, 16, 1e-2)
    assert error(got[0], want[0]) < 1e-4 and error(c * got[1], want[1]) < 1e-3
    assert error(torch.matmul(*norm(c * S, 16, 1e-2)), torch.matmul(*norm(S, 16, 1e-2))) < 1e-4


def test_gradient_in_float64_where_products_are_rounded():
    on_cuda = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert product_dtype(on_cuda) == torch.float32
    torch.set_float32_matmul_precision("high")
    try:
        assert product_dtype(on_cuda) == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")
