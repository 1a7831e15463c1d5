from midtune.model.sizes import Sizes

# Ten blocks of 64 x 256 weights in linear layers and 100 others, an embedding of 1,000 and a head of as many.
SIZES = Sizes(
    blocks=10,
    linear=64 * 256,
    rest=100,
    widths=320,
    embedding=1000,
    head=1000,
    outside=10,
    hidden=8,
    lookups=1000,
)
