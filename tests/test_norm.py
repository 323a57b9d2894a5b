"""norm(S), eq. 7: values and gradients against float64, plain formulas and finite differences."""

import pytest
import torch

from generator import MatmulNorm, SpectralNorm, frobenius_norm, sketch, solve_lyapunov, svd_norm

# name: (the function of (S, rank, damping), whether it takes the full SVD); matmul is what CUDA runs
NORMS = {"svd": (lambda S, rank, damping: svd_norm(S, rank, damping), False), "svd-exact": (lambda S, rank, damping: svd_norm(S, rank, damping, exact=True), True),
         "matmul": (MatmulNorm.apply, False)}
damped = pytest.mark.parametrize("norm, damping", [("svd", 1e-2), ("svd", 0.0), ("svd-exact", 1e-2), ("svd-exact", 0.0), ("matmul", 1e-2), ("matmul", 1e-3)])


def matrix(d, spectrum, seed=0):
    """A float64 (d, d) matrix with those singular values and random directions."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.zeros(d, dtype=torch.float64)
    sigma[:len(spectrum)] = torch.as_tensor(spectrum, dtype=torch.float64)
    return U @ torch.diag(sigma) @ V.T


def plain_norm(S, rank, damping, exact):
    """The formula step by step in float64: range finder, SVD, sigma / sqrt(sigma^2 + lambda^2). lambda is held at its value in S."""
    U, sigma, Vh = torch.linalg.svd(S)
    if not exact:
        Q = torch.linalg.qr(S @ sketch(len(S), rank, S.device).double()).Q
        Q = torch.linalg.qr(S @ torch.linalg.qr(S.T @ Q).Q).Q
        U, sigma, Vh = torch.linalg.svd(Q.T @ S, full_matrices=False)
        U = Q @ U
    U, sigma, Vh = U[:, :rank], sigma[:rank], Vh[:rank]
    lam = plain_norm.lam if plain_norm.lam is not None else damping * sigma[0]
    return U @ torch.diag(torch.where(sigma > 1e-6 * sigma[0], sigma / torch.sqrt(sigma**2 + lam**2), 0)) @ Vh


plain_norm.lam = None


@damped
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_value_in_fp32(condition, damping, norm):
    d, r = 64, 16
    spectrum = torch.logspace(4, 4 - torch.log10(torch.tensor(float(condition))).item(), r, dtype=torch.float64)
    tail = spectrum[-1] * torch.logspace(-0.5, -3, d - r, dtype=torch.float64)
    S = matrix(d, torch.cat([spectrum, tail]))
    U, V = NORMS[norm][0](S.float(), r, damping)
    want = plain_norm(S.float().double(), r, damping, NORMS[norm][1])
    assert (U @ V - want).norm() < 1e-3 * want.norm()


@damped
@pytest.mark.parametrize("spectrum", [range(5, 0, -1), [3, 3, 3, 1, 1], [2] * 8, list(range(24, 0, -1))], ids=["short", "tied", "all tied", "full"])
def test_gradient_against_finite_differences(spectrum, damping, norm):
    """Exact wherever rank(S) <= r, ties included; the full spectrum is exact for svd-exact, and for the others at rank = d_r."""
    d, (function, exact) = 24, NORMS[norm]
    rank = 8 if len(spectrum) <= 8 or exact else d
    S = matrix(d, list(spectrum)).requires_grad_()
    G = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    U, V = function(S, rank, damping)
    (U @ V * G).sum().backward()
    plain_norm.lam = damping * max(spectrum)
    for seed in range(4):
        random = torch.Generator().manual_seed(10 + seed)
        L, R = (torch.randn(d, d, dtype=torch.float64, generator=random) for _ in range(2))
        with torch.no_grad():
            step = 1e-6 * (L @ S + S @ R)                                       # keeps the rank, so that norm stays differentiable
            numeric = ((plain_norm(S + step, rank, damping, exact) - plain_norm(S - step, rank, damping, exact)) * G).sum() / 2
            analytic = (S.grad * step).sum()
        assert abs(numeric - analytic) < 1e-4 * step.norm() * S.grad.norm()
    plain_norm.lam = None


@damped
@pytest.mark.parametrize("S", [torch.zeros(24, 24), torch.eye(24), matrix(24, [5, 3, 1]).float(), matrix(24, [4, 4, 4, 4]).float()],
                         ids=["zero", "identity", "three tokens", "ties"])
def test_corners(S, damping, norm):
    """Null directions give 0, not noise; values and gradients are finite; two calls agree to the bit."""
    rank, directions = 8, min(8, torch.linalg.matrix_rank(S).item())
    S, function = S.clone().requires_grad_(), NORMS[norm][0]
    U, V = function(S, rank, damping)
    N = U @ V
    N.backward(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))
    assert S.grad.isfinite().all()
    sigma = torch.linalg.svdvals(N.detach())
    assert (sigma[:directions] > 0.95).all() and (sigma[directions:] < 1e-4).all()
    torch.rand(3)                                                               # the global generator must not matter
    again = function(S, rank, damping)
    assert torch.equal(U, again[0]) and torch.equal(V, again[1])


@pytest.mark.parametrize("damping", [1e-2, 1e-3])
@pytest.mark.parametrize("tail", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_gradient_in_fp32(condition, tail, damping):
    """Both ways of computing the gradient, in fp32, against the Daleckii-Krein formula in float64: contexts shorter and longer than r."""
    d, r = 64, 16
    spectrum = torch.logspace(4, 4 - torch.log10(torch.tensor(float(condition))).item(), r if tail else r - 4, dtype=torch.float64)
    S = matrix(d, torch.cat([spectrum, spectrum[-1] * torch.logspace(-0.5, -3, d - r, dtype=torch.float64)]) if tail else spectrum).float()
    G = torch.randn(d, d, generator=torch.Generator().manual_seed(1))

    def gradient(function, S):
        S = S.clone().requires_grad_()
        left, right = function.apply(S, r, damping, *([False] if function is SpectralNorm else []))
        (left @ right).backward(G.to(S.dtype))
        return S.grad

    want = gradient(SpectralNorm, S.double())
    for function in (SpectralNorm, MatmulNorm):
        assert (gradient(function, S) - want).norm() < 1e-2 * want.norm()
    assert (gradient(MatmulNorm, S.double()) - want).norm() < 1e-4 * want.norm()


def test_lyapunov():
    random = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(3, 12, 12, generator=random, dtype=torch.float64)).Q
    B = Q @ torch.diag(torch.logspace(1, -1, 12, dtype=torch.float64)) @ Q.mT
    Y = torch.randn(3, 12, 12, generator=random, dtype=torch.float64)
    Y = Y + Y.mT
    W = solve_lyapunov(B, Y, low=1e-2)
    torch.testing.assert_close(B @ W + W @ B, Y)


def test_full_rank_is_the_polar_factor():
    S = matrix(24, torch.linspace(9, 1, 24))
    U, _, Vh = torch.linalg.svd(S)
    for exact in (False, True):
        left, right = svd_norm(S, 24, 0.0, exact)
        torch.testing.assert_close(left @ right, U @ Vh)


def test_batches_are_independent():
    S = torch.stack([matrix(24, [5, 3, 1], seed=s).float() for s in range(6)]).view(2, 3, 24, 24)
    U, V = svd_norm(S, 8)
    for b in range(2):
        for j in range(3):
            one = svd_norm(S[b, j], 8)
            torch.testing.assert_close((U @ V)[b, j], one[0] @ one[1])


def test_frobenius():
    S = matrix(24, [5, 3, 1])
    torch.testing.assert_close(frobenius_norm(S), S / (S.square().sum() + 1e-6).sqrt())
    assert torch.equal(frobenius_norm(torch.zeros(24, 24)), torch.zeros(24, 24))
