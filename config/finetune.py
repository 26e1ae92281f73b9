# Fine-tuning: a trained GPT-2 goes on with a text of yours, and the weights of the lowest validation loss are kept.
# python train.py config/finetune.py --input=my.txt --dataset=mine
# With --init_from=auto:gpt2 the same command goes on with what is there.
# A step is 8,192 tokens: 12 s of GPT-2 small on two CPU cores with bf16.
out_dir = 'out/finetune'
init_from = 'gpt2'  # OpenAI's, from the Hub; or --init_from=a path: folio's, nanoGPT's, a folder in Hugging Face's format

batch_size = 4
gradient_accumulation_steps = 8
seq_len = 256          # longer sees more at once and takes more memory
dropout = 0.1

learning_rate = 5e-5   # a tenth of a new model's: what it knows should stay
min_lr = 5e-6
warmup_iters = 10
max_iters = 200

patience = 3           # evaluations without a better validation loss
log_interval = 1
eval_interval = 10
eval_iters = 20
checkpoint_interval = 50
sample_interval = 50
final_eval_tokens = 40_000
