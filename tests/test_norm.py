"""norm(S), eq. 7: values and gradients against float64, plain formulas and finite differences."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generator
from generator import frobenius_norm, range_finder, sketch, svd_norm
from support.matmul_norm import MatmulNorm, product_dtype, solve_lyapunov


def matmul_norm(S, rank, damping):
    """What svd_norm runs on CUDA."""
    return MatmulNorm.apply(S, range_finder(S.detach(), rank), damping)


# name: (the function of (S, rank, damping), whether it takes the full SVD)
NORMS = {"svd": (svd_norm, False), "svd-exact": (lambda *arguments: svd_norm(*arguments, exact=True), True),
         "matmul": (matmul_norm, False)}
damped = pytest.mark.parametrize("norm, damping",
                                 [("svd", 1e-2), ("svd", 0.0), ("svd-exact", 1e-2), ("svd-exact", 0.0),
                                  ("matmul", 1e-2), ("matmul", 1e-3)])


def matrix(d, spectrum, seed=0):
    """A float64 (d, d) matrix with those singular values and random directions."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.zeros(d, dtype=torch.float64)
    sigma[:len(spectrum)] = torch.as_tensor(spectrum, dtype=torch.float64)
    return U @ torch.diag(sigma) @ V.T


def plain_norm(S, rank, damping, exact):
    """The formula step by step in float64: range finder, SVD, sigma / sqrt(sigma^2 + lambda^2). lambda is held at its
    value in S."""
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
@pytest.mark.parametrize("spectrum", [range(5, 0, -1), [3, 3, 3, 1, 1], [2] * 8, list(range(24, 0, -1))],
                         ids=["short", "tied", "all tied", "full"])
def test_gradient_against_finite_differences(spectrum, damping, norm):
    """Exact wherever rank(S) <= r, ties included; the full spectrum is exact for svd-exact, and for the others at rank
    = d_r."""
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
            step = 1e-6 * (L @ S + S @ R)  # keeps the rank, so that norm stays differentiable
            change = plain_norm(S + step, rank, damping, exact) - plain_norm(S - step, rank, damping, exact)
            numeric = (change * G).sum() / 2
            analytic = (S.grad * step).sum()
        assert abs(numeric - analytic) < 1e-4 * step.norm() * S.grad.norm()
    plain_norm.lam = None


@damped
@pytest.mark.parametrize("S",
                         [torch.zeros(24, 24), torch.eye(24), matrix(24, [5, 3, 1]).float(),
                          matrix(24, [4, 4, 4, 4]).float()],
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
    """Both ways of computing the gradient, in fp32, against the Daleckii-Krein formula in float64: contexts shorter and
    longer than r."""
    d, r = 64, 16
    spectrum = falling(condition, r if tail else r - 4)
    S = matrix(d, torch.cat([spectrum, spectrum[-1] * torch.logspace(-0.5, -3, d - r, dtype=torch.float64)]) if tail
               else spectrum).float()
    want = value_and_gradient(svd_norm, S.double(), r, damping)[1]
    for function in (svd_norm, matmul_norm):
        assert (value_and_gradient(function, S, r, damping)[1] - want).norm() < 1e-2 * want.norm()
    assert (value_and_gradient(matmul_norm, S.double(), r, damping)[1] - want).norm() < 1e-4 * want.norm()


def falling(condition, n):
    """n singular values from 1e4 to 1e4 / condition."""
    return torch.logspace(4, 4 - math.log10(condition), n, dtype=torch.float64)


def value_and_gradient(function, S, rank, damping):
    """norm(S) and the gradient by S of its product with a fixed random matrix, both in float64."""
    S = S.clone().requires_grad_()
    left, right = function(S, rank, damping)
    N = left.double() @ right.double()
    N.backward(torch.randn(S.shape, generator=torch.Generator().manual_seed(1)).double())
    return N.detach(), S.grad.double()


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("damping", [1e-2, 1e-3])
@pytest.mark.parametrize("tokens", [3, 16])
@pytest.mark.parametrize("condition", [1, 1e2, 1e3])
def test_rank_of_the_tokens_read(condition, tokens, damping):
    """S of a context shorter than r: the rank of the context gives the norm and the gradient of rank r."""
    S = matrix(64, falling(condition, tokens)).float()
    for function in (svd_norm, matmul_norm):
        short, full = (value_and_gradient(function, S, rank, damping) for rank in (tokens, 32))
        assert function(S, tokens, damping)[0].shape == (64, tokens) and error(short[0], full[0]) < 1e-4
        # the matrix products lose the difference of two terms 1 / damping large at the first direction's tie with
        # itself
        assert error(short[1], full[1]) < (1e-4 if function is svd_norm else 2e-7 / damping**2)


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


# ---- the machine's settings


class RoundedProducts(TorchDispatchMode):
    """fp32 matrix products with the 10-bit mantissas of TF32, which no CPU has."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.float32:
            args = tuple(((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def precision():
    """Lets a test change the process's fp32 precision."""
    yield
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        place.fp32_precision = "none"


@pytest.mark.parametrize("norm", NORMS)
def test_full_precision_where_products_are_rounded(precision, norm):
    """Value and gradient under fp32 products of 10 bits, as on a GPU with TF32; the switch stays as the user set it."""
    S, function = matrix(64, falling(1e3, 16)).float(), NORMS[norm][0]
    want = value_and_gradient(function, S, 16, 1e-2)
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"                # the older interface's getters raise after this
    with RoundedProducts():
        assert error(S @ S, S.double() @ S.double()) > 1e-4
        got = value_and_gradient(function, S, 16, 1e-2)
    assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    assert all(error(*pair) < 1e-4 for pair in zip(got, want))


@pytest.mark.parametrize("switch",
                         ["torch.set_float32_matmul_precision('high')", "torch.set_float32_matmul_precision('medium')",
                          "torch.backends.cuda.matmul.allow_tf32 = True",
                          "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
                          "torch.backends.fp32_precision = 'tf32'"])
def test_every_switch_of_tf32_is_seen(precision, switch):
    on_cuda = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert product_dtype(on_cuda) == torch.float32
    exec(switch)
    assert product_dtype(on_cuda) == torch.float64


class OnCuda(torch.Tensor):
    """A CPU tensor that svd_norm takes for one on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-5, 1e-8])
def test_gradient_on_cuda_at_any_damping(damping, monkeypatch):
    """Matrix products where the damping is enough for their gradient."""
    S, went = matrix(64, [5] * 12).float(), []
    monkeypatch.setattr(generator, "MatmulNorm",
                        SimpleNamespace(apply=lambda *arguments: went.append(arguments)
                                        or MatmulNorm.apply(*arguments)))
    got = value_and_gradient(svd_norm, S.as_subclass(OnCuda), 16, damping)
    assert len(went) == (damping >= 1e-4)
    want = value_and_gradient(svd_norm, S.double(), 16, damping)
    assert all(error(*pair) < 1e-3 for pair in zip(got, want))


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_a_large_S(norm):
    """norm(c S) = norm(S): its gradient by S is that of c S times c. c = 1e12 makes sigma^4 overflow fp32."""
    S, c = matrix(64, falling(1e2, 12)).float(), 1e12
    got, want = (value_and_gradient(NORMS[norm][0], m, 16, 1e-2) for m in (c * S, S))
    assert error(got[0], want[0]) < 1e-4 and error(c * got[1], want[1]) < 1e-3


def test_default_device():
    """torch.set_default_device moves neither the sketch nor anything else."""
    S = matrix(24, [5, 3, 1]).float()
    want, Omega = svd_norm(S, 8), sketch(24, 8, S.device)
    sketch.cache_clear()
    with torch.device("meta"):
        assert torch.equal(sketch(24, 8, S.device), Omega)
        assert all(torch.equal(*pair) for pair in zip(svd_norm(S, 8), want))
        matmul_norm(S, 8, 1e-2)
