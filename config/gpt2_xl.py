# GPT-2 XL (1,558M) on the data and batch of config/gpt2.py, on eight GPUs of 80 GB. Not run yet.
# torchrun --nproc_per_node=8 train.py config/gpt2_xl.py --init_from=auto
from config.gpt2 import *
out_dir = 'out/gpt2_xl'

n_layer = 48
n_head = 25
n_embd = 1600
batch_size = 8                    # windows in a GPU's pass: 61 GB by .ci/memory, so no gradient_checkpointing
gradient_accumulation_steps = 64  # passes of all GPUs together: eight for each of eight

learning_rate = 2e-4              # GPT-3's for this size, https://arxiv.org/abs/2005.14165
min_lr = 2e-5
