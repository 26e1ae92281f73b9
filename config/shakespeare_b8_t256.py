# Reference run D: 8 x 256 tokens, 1.71 at step 2,050, 0.0109 at the end of 5,000.
# python train.py config/shakespeare_b8_t256.py
out_dir = 'out/shakespeare_b8_t256'
dataset = 'shakespeare_all'
tokenizer = 'gpt2'
val_fraction = 0.0
shift_windows = False

batch_size = 8
seq_len = 256

learning_rate = 3e-4
min_lr = 0.0
schedule = 'cosine'
warmup_iters = 500
max_iters = 5000
lr_decay_iters = 5000
weight_decay = 0.1     # not published: ours
beta1 = 0.9            # not published: ours
beta2 = 0.95           # not published: ours
dropout = 0.0          # not published: ours
grad_clip = 1.0
seed = 1337            # not published: ours ("seeded")

log_interval = 50
final_eval_tokens = 20_000  # ours: keeps a trial run on a CPU short; 0 = all
