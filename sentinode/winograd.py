"""3x3 convolutions on CPUs with a quarter of the multiplications, for networks that do not train."""

import torch
from torch import nn

# F(4x4, 3x3) of Lavin and Gray 2016 (arXiv 1509.09308): a window of 6x6 pixels and a kernel of 3x3 make 4x4 outputs with 36 multiplications
# per pair of channels instead of 144. Larger windows save more and cost precision.
_OUT, _IN = 4, 6
_PIXELS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))
_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

# With fewer channels the transforms cost what the multiplications save.
_MIN_CHANNELS = 128
# Windows worked on at once: enough of them for each reading of the kernels, few enough to stay in the cache.
_WINDOWS = 128
# Share of the multiplications that may be left where the image is no multiple of 4 pixels; 14 px leave a third.
_MAX_SHARE = 0.35


class WinogradConv2d(nn.Module):
    """A convolution that computes what `convolution` does within rounding, about 1e-5 of the largest output; not for training.

    Input and output are float (n, channels, height, width). Where the algorithm does not pay (reduced precision, images of a few pixels, several
    threads, which would have to wait for each other after each of its many steps), it is `convolution` itself that works.
    """

    pixels: torch.Tensor
    outputs: torch.Tensor
    kernels: torch.Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        pixels, kernel, outputs = (torch.tensor(matrix, dtype=torch.float64) for matrix in (_PIXELS, _KERNEL, _OUTPUTS))
        # Both directions at once: row i, column j of a window is value 6 i + j of its vector.
        kernels = torch.einsum("ia,jb,kcab->ijck", kernel, kernel, convolution.weight.detach().double()).flatten(0, 1)
        for name, value in {"pixels": torch.kron(pixels, pixels), "outputs": torch.kron(outputs, outputs), "kernels": kernels}.items():
            self.register_buffer(name, value.float().contiguous(), persistent=False)

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether a layer can be replaced with gain: 3x3, stride 1, same padding, float32 on a CPU, enough channels."""
        return (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
            and module.padding in ((1, 1), "same")
            and module.padding_mode == "zeros"
            and min(module.in_channels, module.out_channels) >= _MIN_CHANNELS
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, channels, height, width = x.shape
        down, across = -(-height // _OUT), -(-width // _OUT)
        at_once = min(rows, max(1, _WINDOWS // (down * across)))
        windows = at_once * down * across
        exact = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        left = _IN * _IN * down * across / (9 * height * width)
        if not exact or left > _MAX_SHARE or 2 * windows < channels or torch.get_num_threads() > 1:
            return self.convolution(x)  # type: ignore[no-any-return]
        made = self.convolution.out_channels
        # Buffers that every piece of work uses anew, and views of them. Windows overlap by two pixels.
        padded = x.new_zeros(at_once, down * _OUT + 2, across * _OUT + 2, channels)
        overlapping = padded.unfold(1, _IN, _OUT).unfold(2, _IN, _OUT).permute(4, 5, 0, 1, 2, 3)
        gathered = x.new_empty(_IN, _IN, at_once, down, across, channels)
        transformed = x.new_empty(_IN * _IN, windows * channels)
        products = x.new_empty(_IN * _IN, windows, made)
        squares = x.new_empty(_OUT * _OUT, windows * made)
        image = x.new_empty(at_once, down, _OUT, across, _OUT, made)
        cropped = image.view(at_once, down * _OUT, across * _OUT, made)[:, :height, :width]
        bias = x.new_zeros(made) if self.convolution.bias is None else self.convolution.bias
        channels_last, out = x.permute(0, 2, 3, 1), x.new_empty(rows, height, width, made)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)  # the last piece leaves the rest of the buffers as they were
            padded[:count, 1 : height + 1, 1 : width + 1] = channels_last[start : start + count]
            gathered.copy_(overlapping)
            torch.mm(self.pixels, gathered.view(_IN * _IN, -1), out=transformed)
            torch.bmm(transformed.view(_IN * _IN, windows, channels), self.kernels, out=products)
            torch.mm(self.outputs, products.view(_IN * _IN, -1), out=squares)
            image.copy_(squares.view(_OUT, _OUT, at_once, down, across, made).permute(2, 3, 0, 4, 1, 5))
            torch.add(cropped[:count], bias, out=out[start : start + count])
        return out.permute(0, 3, 1, 2)
