"""Autograd functions: the law of an adapted layer in one step, with little kept but the layer's input.

They are optimizations of what the plugins write in plain operations, and are used in eager mode only: `torch.compile`,
`torch.func`, tracing and forward-mode differentiation see the plain operations, and so does a second derivative.
"""
