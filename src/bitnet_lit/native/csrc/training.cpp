// The functions that Python calls: see ../library.py. The structures are filled in there.
#include "attention.h"
#include "decoder_layer.h"
#include "gated_mlp.h"
#include "linears.h"
#include "loss.h"
#include "newton_schulz.h"
#include "openmp.h"

extern "C" {
void bitnet_linears_forward(const Linears* a) { linears_forward(*a); }
void bitnet_linears_backward(const Linears* a) { linears_backward(*a); }
void bitnet_gated_mlp_forward(const GatedMlp* a) { gated_mlp_forward(*a); }
void bitnet_gated_mlp_backward(const GatedMlp* a) { gated_mlp_backward(*a); }
void bitnet_attention_forward(const Attention* a) { attention_forward(*a); }
void bitnet_attention_backward(const Attention* a) { attention_backward(*a); }
void bitnet_decoder_layer_forward(DecoderLayer* a) { decoder_layer_forward(*a); }
void bitnet_decoder_layer_backward(DecoderLayer* a) { decoder_layer_backward(*a); }
void bitnet_loss(const Loss* a) { next_token_loss(*a); }
void bitnet_newton_schulz(const NewtonSchulz* a) { newton_schulz(*a); }
void bitnet_muon_step(const MuonStep* a) { muon_step(*a); }
void bitnet_let_openmp_rest(Fork fork) { let_openmp_rest(fork); }
int32_t bitnet_has_amx() { return has_amx(); }
}
