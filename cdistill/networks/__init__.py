"""Networks as plain modules, under the parameter names of EDM's own files.

Read `denoiser` (D(x, t, s), and EDM's way of wrapping a U-Net F into one), `unet` (what the U-Nets share), `song`
(DDPM++, NCSN++), `adm`, `architecture` (a network from its description), `discriminator` (of CTM's GAN loss).
"""
