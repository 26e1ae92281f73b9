# GPT-2 medium (355M) on the data and batch of config/gpt2.py, on eight GPUs of 80 GB. Not run yet.
# torchrun --nproc_per_node=8 train.py config/gpt2_medium.py --init_from=auto
from config.gpt2 import *
out_dir = 'out/gpt2_medium'

n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 32                   # windows in a GPU's pass: 42 GB by .ci/memory, so no gradient_checkpointing

learning_rate = 3e-4              # GPT-3's for this size, https://arxiv.org/abs/2005.14165
min_lr = 3e-5
