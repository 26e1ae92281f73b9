# GPT-2 large (774M) on the data and batch of config/gpt2.py, on eight GPUs of 80 GB. Not run yet.
# torchrun --nproc_per_node=8 train.py config/gpt2_large.py --init_from=auto
from config.gpt2 import *
out_dir = 'out/gpt2_large'

n_layer = 36
n_head = 20
n_embd = 1280
batch_size = 16                   # windows in a GPU's pass: 49 GB by .ci/memory, so no gradient_checkpointing
gradient_accumulation_steps = 32  # passes of all GPUs together: four for each of eight

learning_rate = 2.5e-4            # GPT-3's for this size, https://arxiv.org/abs/2005.14165
min_lr = 2.5e-5
