"""norm(S) as batched matrix products. generator.svd_norm needs it on CUDA, where eigh and SVD go matrix by matrix."""

import torch


def product_dtype(S):
    """The dtype for products over S: its own, but float64 where fp32 products may run in TF32 or bf16, whose 10 or 7
    bits would turn the weak directions of S, a thousand times below the strong, into noise. The switch belongs to the
    whole process, so it is only read."""
    backend = torch.backends.cuda if S.is_cuda else torch.backends.mkldnn
    return S.dtype if backend.matmul.fp32_precision in ("none", "ieee") else torch.float64


def inverse_cholesky(gram):
    """L^-1 of gram + shift = L L^T: symmetric positive semidefinite gram (..., r, r) float64. The shift, 1e-13 of the
    trace, keeps null directions defined."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    shift = 1e-13 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-60
    L = torch.linalg.cholesky_ex(gram + shift * eye).L
    return torch.linalg.solve_triangular(L, eye.expand_as(gram), upper=False)


class MatmulNorm(torch.autograd.Function):
    """(S, Q, damping) -> (Q, P), norm(S) = Q P: the function of S that SpectralNorm is, from the same Q (..., d_r, r).
    P = Z M, M = Q^T S, Z = (M M^T + lambda^2)^(-1/2), lambda = damping sigma_1. The r x r iterations run in float64.

    Z by Newton-Schulz, X <- X (3 - a^2 X^2) a / 2, with the a that is best for the spectrum known to lie in
    [damping, 1] sigma_1 (Chen and Chow 2014): 9 steps at damping 1e-2. SpectralNorm's gradient without singular
    vectors, R = Z^-1 and dN the gradient by norm(S); Q is a constant to autograd, its turning with S is in the formula:

        grad_S = Q (Z X - 2 W M) + (I - Q Q^T) (dN P^T) (M M^T)^-1 M,   X = Q^T dN,   R W + W R = sym(Z X M^T Z)

    Z X and 2 W M cancel for small damping: below 1e-4 the rounding of M is all that is left.
    """

    @staticmethod
    def forward(ctx, S, Q, damping):
        wide = product_dtype(S)
        M = (Q.to(wide).mT @ S.to(wide)).double()                           # (..., r, d_r)
        gram = M @ M.mT                                                     # (..., r, r)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        square = largest_eigenvalue(gram).clamp(min=1e-24)[..., None, None]           # sigma_1^2, (..., 1, 1)
        top = square * (1 + damping**2)
        R, Z, low = (gram + damping**2 * square * eye) / top, eye, damping / (1 + damping**2) ** 0.5
        while low < 1 - 1e-6:                                   # R -> R^(1/2), Z -> R^(-1/2); low bounds Z R from below
            a = (3 / (1 + low + low**2)) ** 0.5
            low = a * low * (3 - a**2 * low**2) / 2
            T = 1.5 * a * eye - 0.5 * a**3 * (Z @ R)
            R, Z = R @ T, T @ Z
        R, Z = R * top.sqrt(), Z / top.sqrt()
        ctx.save_for_backward(Q, M.to(S.dtype), R, Z)
        ctx.damping = damping
        return Q, (Z @ M).to(S.dtype)                                       # (..., d_r, r), (..., r, d_r)

    @staticmethod
    def backward(ctx, grad_Q, grad_P):                                      # dN P^T (..., d_r, r), Q^T dN (..., r, d_r)
        Q, M, R, Z = ctx.saved_tensors
        dtype, wide, M, X = Q.dtype, product_dtype(Q), M.double(), grad_P.double()
        Y = Z @ (X @ M.mT) @ Z                                              # (..., r, r)
        W = solve_lyapunov(R, (Y + Y.mT) / 2, ctx.damping)
        inside = (Z @ X - 2 * W @ M).to(wide)                               # (..., r, d_r)
        inverse, Q = inverse_cholesky(M @ M.mT), Q.to(wide)
        outside = grad_Q.to(wide) @ (inverse.mT @ (inverse @ M)).to(wide)   # (..., d_r, d_r)
        return (Q @ (inside - Q.mT @ outside) + outside).to(dtype), None, None


def largest_eigenvalue(gram):
    """(...,) of positive semidefinite gram (..., r, r) float64: tr(gram^k)^(1/k) with k = 4,096, at most r^(1/k) too
    large (0.1 % at r = 128)."""
    log, k = 0.0, 1
    for power in (64, 64, 1):
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-200)
        log = log + trace.log() / k
        gram, k = torch.linalg.matrix_power(gram / trace[..., None, None], power), k * power
    return log.exp()


def solve_lyapunov(R, Y, low):
    """W with R W + W R = Y, by Smith's doubling: R (..., r, r), eigenvalues in [low, 1] of the largest, Y symmetric."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    p = low**0.5 * largest_eigenvalue(R)[..., None, None]                   # the geometric mean converges fastest
    inverse = inverse_cholesky(p * eye + R)
    V = inverse.mT @ inverse                                                # (p + R)^-1
    W, C, left = 2 * p * V @ Y @ V, 2 * p * V - eye, (1 - low**0.5) / (1 + low**0.5)
    while left > 1e-9:                                                      # W = sum_k C^k W_0 C^k, |C| <= left
        W, C, left = W + C @ W @ C, C @ C, left**2
    return W
