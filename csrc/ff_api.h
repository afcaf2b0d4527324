// The ABI of the native kernels: plain C, no PyTorch. One declaration per entry.
//
// Conventions. Pointers address contiguous memory unless an entry says otherwise. Sizes are int64_t. Nothing here
// allocates device memory, synchronises, throws or keeps a pointer. The caller has checked shapes and types; an entry
// returns FF_OK or an error code, positive codes being cudaError_t. Entries of libffcpu take the number of threads,
// entries of libffcuda the stream (a cudaStream_t) and run on the current device.
#ifndef FF_API_H
#define FF_API_H

#include <stdint.h>

#if defined(_WIN32)
#define FF_EXPORT __declspec(dllexport)
#else
#define FF_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// FF_NOT_SERVED: another entry has to serve the call.
enum ff_error { FF_OK = 0, FF_UNSUPPORTED_DTYPE = -1, FF_BAD_ARGUMENT = -2, FF_OUT_OF_MEMORY = -3, FF_NOT_SERVED = -4 };
enum ff_dtype { FF_FLOAT32 = 0, FF_FLOAT64 = 1, FF_FLOAT16 = 2, FF_BFLOAT16 = 3 };
enum ff_layout { FF_NCHW = 0, FF_NHWC = 1 };
enum ff_resample { FF_RESAMPLE_NONE = 0, FF_RESAMPLE_UP = 1, FF_RESAMPLE_DOWN = 2 };
enum ff_activation { FF_NONE = 0, FF_RELU = 1, FF_LEAKY_RELU = 2, FF_SILU = 3 };

// y = channel shuffle of x: out channel i * groups + j is in channel j * (channels / groups) + i. The backward pass is
// the same entry with channels / groups in the place of groups. `spatial` = H * W.
FF_EXPORT int ff_cpu_channel_shuffle(const void *x, void *y, int64_t batch, int64_t channels, int64_t spatial,
                                     int64_t groups, int layout, int dtype, int threads);
FF_EXPORT int ff_cuda_channel_shuffle(const void *x, void *y, int64_t batch, int64_t channels, int64_t spatial,
                                      int64_t groups, int layout, int dtype, void *stream);

// Boxes (batch, anchors, 4) as x1 y1 x2 y2 and points (batch, anchors, coordinates) from regressions of the same shapes
// against priors (anchors, 4) cx cy w h; v0, v1 are the variances. Float32 and float64.
FF_EXPORT int ff_cpu_decode(const void *bbox, const void *landmarks, const void *priors, void *boxes, void *points,
                            int64_t batch, int64_t anchors, int64_t coordinates, double v0, double v1, int dtype);
// Bytes of workspace for nms and detect: `candidates` boxes enter, `kept` leave at most.
FF_EXPORT int64_t ff_cpu_detection_workspace(int64_t candidates, int64_t kept, int dtype);
// Greedy suppression of boxes (count, 4), scores (count,) `score_stride` elements apart. Writes the indices it keeps,
// best first, to keep (count,) and returns their number, or a negative error code.
FF_EXPORT int64_t ff_cpu_nms(const void *boxes, const void *scores, int64_t score_stride, int64_t count,
                             double threshold, int64_t *keep, void *workspace, int dtype);
// Filter, top-k, decoding and suppression for one image. Writes up to keep_top_k rows of boxes (., 4), kept_scores (.,)
// and points (., coordinates), and returns their number, or a negative error code.
FF_EXPORT int64_t ff_cpu_detect(const void *bbox, const void *scores, int64_t score_stride, const void *landmarks,
                                const void *priors, int64_t anchors, int64_t coordinates, double score_threshold,
                                double nms_threshold, int64_t top_k, int64_t keep_top_k, double v0, double v1,
                                void *boxes, void *kept_scores, void *points, void *workspace, int dtype);

// The same on a device, for float32 and half precision: sizes are the limits, the number of results is written to
// *total on the device. nms takes a workspace for (count, count), detect for (anchors, top_k), keep_top_k <= top_k <=
// anchors.
FF_EXPORT int ff_cuda_decode(const void *bbox, const void *landmarks, const void *priors, void *boxes, void *points,
                             int64_t batch, int64_t anchors, int64_t coordinates, double v0, double v1, int dtype,
                             void *stream);
FF_EXPORT int64_t ff_cuda_detection_workspace(int64_t candidates, int64_t limit);
FF_EXPORT int ff_cuda_nms(const void *boxes, const void *scores, int64_t score_stride, int64_t count, double threshold,
                          int64_t *keep, int64_t *total, void *workspace, int dtype, void *stream);
FF_EXPORT int ff_cuda_detect(const void *bbox, const void *scores, int64_t score_stride, const void *landmarks,
                             const void *priors, int64_t anchors, int64_t coordinates, double score_threshold,
                             double nms_threshold, int64_t top_k, int64_t keep_top_k, double v0, double v1, void *boxes,
                             void *kept_scores, void *points, int64_t *total, void *workspace, int dtype, void *stream);

// Bytes of workspace for preprocess.
FF_EXPORT int64_t ff_cpu_preprocess_workspace(int64_t height, int64_t width, int64_t resized_height,
                                              int64_t resized_width, int out_dtype, int threads);
// image (batch, height, width, 3), strides in elements, uint8 (in_dtype -1) or out_dtype -> out (batch, 3,
// canvas_height, canvas_width): resized, at (top, left) on a canvas of zeros, channels reversed if flip, minus the
// means mean0..2 of the output's channels.
FF_EXPORT int ff_cpu_preprocess(const void *image, int64_t batch_stride, int64_t row_stride, int64_t pixel_stride,
                                int64_t channel_stride, int64_t batch, int64_t height, int64_t width, void *out,
                                int64_t resized_height, int64_t resized_width, int64_t canvas_height,
                                int64_t canvas_width, int64_t top, int64_t left, int flip, double mean0, double mean1,
                                double mean2, void *workspace, int in_dtype, int out_dtype, int threads);
// The same on a device; the image is uint8 or float32, the output float32 or half precision.
FF_EXPORT int ff_cuda_preprocess(const void *image, int64_t batch_stride, int64_t row_stride, int64_t pixel_stride,
                                 int64_t channel_stride, int64_t batch, int64_t height, int64_t width, void *out,
                                 int64_t resized_height, int64_t resized_width, int64_t canvas_height,
                                 int64_t canvas_width, int64_t top, int64_t left, int flip, double mean0, double mean1,
                                 double mean2, int in_dtype, int out_dtype, void *stream);

// Views (count, 16) of photographs (height, width, 3) uint8 that lie one after the other at `pixels` -> out (images, 3,
// size, size) uint8. A view's numbers: offset of the photograph and its width; x, y, width, height of the part that is
// seen, and of where that part stands in a square, before mirroring; mirrored or not; resized with the triangle filter
// widened by the reduction or not; image, left, top and side of the square. What of the square the part does not cover
// is fill0..2.
FF_EXPORT int ff_cuda_crop_resize(const void *pixels, const int64_t *views, int64_t count, int64_t largest_side,
                                  void *out, int64_t size, int fill0, int fill1, int fill2, void *stream);

// Batch normalisation around convolutions. Tensors are NHWC. `stats` is (4, channels): mean, biased variance, scale and
// shift, with y = (z - mean) * scale + shift. `sums` is (2, channels) in double: of g and of g * (z - mean), g being
// the gradient of the batch normalisation's output. Activations are applied to y, or to z where stats is NULL; slope is
// that of the leaky ReLU below zero. Workspaces have the size in bytes that the function before them returns.
FF_EXPORT int ff_cpu_batch_norm_coefficients(const void *mean, const void *var, const void *weight, const void *bias,
                                             double eps, int64_t channels, void *stats, int dtype);
// grad_weight = sum of g * (z - mean) / sqrt(var + eps) and grad_bias = sum of g, from sums and stats whose rows are
// *_row elements apart; grad_conv_bias = scale * sum of g, for a convolution whose mean is not subtracted, scale 1
// where stats is NULL. Each may be NULL.
FF_EXPORT int ff_cpu_batch_norm_gradients(const double *sums, int64_t sums_row, const void *stats, int64_t stats_row,
                                          double eps, int64_t channels, void *grad_weight, void *grad_bias,
                                          void *grad_conv_bias, int dtype);
// Rows of row_bytes bytes, from_row and to_row bytes apart.
FF_EXPORT int ff_cpu_copy_rows(const void *from, int64_t from_row, int64_t rows, int64_t row_bytes, void *to,
                               int64_t to_row);
FF_EXPORT int ff_cpu_from_double(const double *from, int64_t count, void *to, int dtype);
// running += momentum * (batch - running), for the mean and for correction * var.
FF_EXPORT int ff_cpu_batch_norm_update(const void *mean, const void *var, double correction, double momentum,
                                       void *running_mean, void *running_var, int64_t channels, int dtype);
FF_EXPORT int64_t ff_cpu_batch_norm_workspace(int64_t channels, int dtype, int threads);
// y = activation((z - mean) * scale + shift); y may be z.
FF_EXPORT int ff_cpu_batch_norm_apply(const void *z, const void *stats, int activation, double slope, void *y,
                                      int64_t pixels, int64_t channels, void *workspace, int dtype, int threads);
// g = grad * activation'((z - mean) * scale + shift), not stored where g is NULL, and its sums.
FF_EXPORT int ff_cpu_batch_norm_reduce(const void *grad, const void *z, const void *stats, int activation, double slope,
                                       void *g, double *sums, int64_t pixels, int64_t channels, void *workspace,
                                       int dtype, int threads);

// z = conv(x_activation(batch norm(x))) + bias, kernel k x k, k <= 7, weight (O, C / groups, k, k), z dense. Outputs
// from `split` on (O: none) are those of a second convolution with as many groups. Pixels of x are x_pixel elements
// apart. x_stats NULL: x as it is. stats not NULL: filled with the statistics of z and the coefficients that bn_weight,
// bn_bias (NULL: 1, 0) and eps make of them. y_stats, y_activation: applied to z before it is stored.
FF_EXPORT int64_t ff_cpu_conv_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                        int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                                        int64_t groups, int64_t split, int dtype, int threads);
FF_EXPORT int ff_cpu_conv_forward(const void *x, int64_t x_pixel, const void *x_stats, int x_activation, double x_slope,
                                  const void *weight, const void *bias, void *z, void *stats, const void *bn_weight,
                                  const void *bn_bias, double eps, const void *y_stats, int y_activation,
                                  double y_slope, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                  int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding, int64_t groups,
                                  int64_t split, void *workspace, int dtype, int threads);
// The backward pass of the same. grad is g, or with `activation` the gradient of activation(batch norm(z)). stats NULL:
// no batch normalisation; training: its statistics were the batch's, and sums are needed. grad_x (NULL: not wanted) is
// the gradient of x_activation's argument, x_sums (may be NULL) its sums; grad_weight may be NULL.
FF_EXPORT int ff_cpu_conv_backward(const void *grad, int64_t grad_pixel, const void *z, int64_t z_pixel,
                                   const void *stats, const double *sums, int training, int activation, double slope,
                                   double eps, const void *x, int64_t x_pixel, const void *x_stats, int x_activation,
                                   double x_slope, const void *weight, void *grad_x, int64_t grad_x_pixel,
                                   double *x_sums, void *grad_weight, int64_t batch, int64_t channels, int64_t height,
                                   int64_t width, int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t groups, int64_t split, void *workspace, int dtype, int threads);

// Batch normalisation around convolutions on a device, as above, with stats in float32 whatever the dtype. backward:
// the gradient of z from that of the output; sums NULL where the statistics were given.
// coefficients: of layers (count, 7) and eps (count,), both in host memory; a layer is the addresses of mean, variance,
// weight and bias (0: none), its channels, the dtype of these four, and the address of its stats (4, channels).
// affine_dtype: of weight and bias, which may be float32 where z is not.
FF_EXPORT int ff_cuda_batch_norm_coefficients(const int64_t *layers, const double *eps, int64_t count, void *stream);
FF_EXPORT int64_t ff_cuda_batch_norm_workspace(int64_t pixels, int64_t channels);
FF_EXPORT int ff_cuda_batch_norm_statistics(const void *z, const void *weight, const void *bias, double eps,
                                            void *stats, int64_t pixels, int64_t channels, void *workspace, int dtype,
                                            int affine_dtype, void *stream);
FF_EXPORT int ff_cuda_batch_norm_apply(const void *z, const void *stats, int activation, double slope, void *y,
                                       int64_t pixels, int64_t channels, int dtype, void *stream);
FF_EXPORT int ff_cuda_batch_norm_reduce(const void *grad, const void *z, const void *stats, int activation,
                                        double slope, double *sums, int64_t pixels, int64_t channels, void *workspace,
                                        int dtype, void *stream);
FF_EXPORT int ff_cuda_batch_norm_backward(const void *grad, const void *z, const void *stats, const double *sums,
                                          int activation, double slope, double eps, void *out, int64_t pixels,
                                          int64_t channels, int dtype, void *stream);
// Convolutions on a device, as above, of dense NHWC tensors. grad is the gradient of z; input_gradient multiplies by
// the derivative of x_activation.
FF_EXPORT int ff_cuda_conv_forward(const void *x, const void *x_stats, int x_activation, double x_slope,
                                   const void *weight, const void *bias, void *z, const void *y_stats, int y_activation,
                                   double y_slope, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                   int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t groups, int dtype, void *stream);
FF_EXPORT int ff_cuda_conv_input_gradient(const void *grad, const void *weight, const void *x, const void *x_stats,
                                          int x_activation, double x_slope, void *grad_x, int64_t batch,
                                          int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                          int64_t kernel, int64_t stride, int64_t padding, int64_t groups, int dtype,
                                          void *stream);
FF_EXPORT int64_t ff_cuda_conv_weight_gradient_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                                         int64_t out_channels, int64_t kernel, int64_t stride,
                                                         int64_t padding, int64_t groups, int dtype);
FF_EXPORT int ff_cuda_conv_weight_gradient(const void *grad, const void *x, const void *x_stats, int x_activation,
                                           double x_slope, void *grad_weight, int64_t batch, int64_t channels,
                                           int64_t height, int64_t width, int64_t out_channels, int64_t kernel,
                                           int64_t stride, int64_t padding, int64_t groups, void *workspace, int dtype,
                                           void *stream);

// From the predictors' maps of one level, z (batch, pixels, anchors * 16) with the channels of the box, class and
// landmark predictors one after the other, to rows of bbox (batch, rows, 4), cls (batch, rows, 2) and landmarks (batch,
// rows, 10) from first_row on, `anchors` per pixel; and back for gradients, NULL meaning zero. probabilities: cls of a
// softmax.
FF_EXPORT int ff_cpu_multi_head_scatter(const void *z, int64_t batch, int64_t pixels, int64_t anchors, int softmax,
                                        void *bbox, void *cls, void *landmarks, int64_t first_row, int64_t rows,
                                        int dtype, int threads);
FF_EXPORT int ff_cpu_multi_head_gather(const void *bbox, const void *cls, const void *landmarks,
                                       const void *probabilities, int64_t batch, int64_t pixels, int64_t anchors,
                                       void *z, int64_t first_row, int64_t rows, int dtype, int threads);

// The seams of the SSH block. Three branches, slices of channels of raw NHWC outputs with their stats (NULL: activated
// already): y = relu(concatenation), shuffled, dense. split: from the gradient of y, those of the branches' batch
// normalised values (pixels g_pixel elements apart) and their sums.
// A grouped weight (outputs, inputs / groups, kernel, kernel) as a dense one with zeros, and back.
FF_EXPORT int ff_cpu_ssh_grouped_weight(const void *weight, int64_t outputs, int64_t inputs, int64_t kernel,
                                        int64_t groups, void *dense, int dtype);
FF_EXPORT int ff_cpu_ssh_grouped_unpack(const void *dense, int64_t outputs, int64_t inputs, int64_t kernel,
                                        int64_t groups, void *weight, int dtype);
FF_EXPORT int64_t ff_cpu_ssh_grouped_workspace(int64_t channels0, int64_t channels1, int64_t channels2, int dtype,
                                               int threads);
FF_EXPORT int ff_cpu_ssh_grouped_join(const void *z0, int64_t pixel0, int64_t channels0, const void *stats0,
                                      const void *z1, int64_t pixel1, int64_t channels1, const void *stats1,
                                      const void *z2, int64_t pixel2, int64_t channels2, const void *stats2,
                                      int64_t pixels, int64_t groups, void *y, void *workspace, int dtype, int threads);
FF_EXPORT int ff_cpu_ssh_grouped_split(const void *grad, const void *z0, int64_t pixel0, int64_t channels0,
                                       const void *stats0, const void *z1, int64_t pixel1, int64_t channels1,
                                       const void *stats1, const void *z2, int64_t pixel2, int64_t channels2,
                                       const void *stats2, int64_t pixels, int64_t groups, void *g0, int64_t g_pixel0,
                                       double *sums0, void *g1, int64_t g_pixel1, double *sums1, void *g2,
                                       int64_t g_pixel2, double *sums2, void *workspace, int dtype, int threads);
// An engine's plan (engine/plan.py, cpu/engine.h): `count` rows of int64_t, whose names ff_cpu_engine_fields lists,
// separated by commas. arena: floats, of which thread i uses scratch_size from scratch + i * scratch_size on. image:
// batch images as the plan's first block reads them. picture: bytes between images and between rows, height and width
// of the pixels, row and column of the first of them in the network's input, which is zero around them; float images
// fill the input and have no space between rows. bbox, cls, landmarks: (batch, anchors, 4, 2 or 10). `lanes` must be
// ff_cpu_engine_lanes(), the vector width that the plan was packed for. seconds: null, or one double per row, to which
// the time of the step that ends there is added.
FF_EXPORT int ff_cpu_engine_run(const void *plan, int64_t count, void *arena, int64_t scratch, int64_t scratch_size,
                                const void *weights, const void *image, const int64_t *picture, void *bbox, void *cls,
                                void *landmarks, int64_t anchors, int64_t batch, void *seconds, int lanes, int threads);
FF_EXPORT const char *ff_cpu_engine_fields(void);
FF_EXPORT int ff_cpu_engine_lanes(void);
// How bfloat16 is multiplied here: 0 in float32, for tests, 1 by tiles (AMX), 2 by dot products of pairs (AVX512-BF16).
FF_EXPORT int ff_cpu_engine_bf16(void);
// FLOP/s of `threads` threads that do nothing but multiply and add float32 (low: bfloat16, 0 where it is multiplied in
// float32), measured for some hundredths of a second.
FF_EXPORT double ff_cpu_engine_peak(int low, int threads);

// Modulated deformable convolution, NHWC, H' x W' output: offset (batch, H', W', 2 K) as (dy, dx) per tap, mask (batch,
// H', W', K), weight (O, C, kernel_h, kernel_w). stats not NULL: filled with the statistics of z and the
// coefficients that bn_weight, bn_bias (NULL: 1, 0) and eps make of them. y_stats, y_activation: applied to z before it
// is stored.
FF_EXPORT int64_t ff_cpu_deform_conv_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height,
                                               int64_t width, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                               int64_t stride, int64_t padding, int dtype, int threads);
FF_EXPORT int ff_cpu_deform_conv_forward(const void *x, const void *offset, const void *mask, const void *weight,
                                         const void *bias, void *z, void *stats, const void *bn_weight,
                                         const void *bn_bias, double eps, const void *y_stats, int y_activation,
                                         double y_slope, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                         int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride,
                                         int64_t padding, void *workspace, int dtype, int threads);
// The backward pass of the same; stats, sums, training and activation as in ff_cpu_conv_backward. grad_x, grad_offset,
// grad_mask and grad_weight may each be NULL: not wanted.
FF_EXPORT int ff_cpu_deform_conv_backward(const void *grad, const void *z, const void *stats, const double *sums,
                                          int training, int activation, double slope, double eps, const void *x,
                                          const void *offset, const void *mask, const void *weight, void *grad_x,
                                          void *grad_offset, void *grad_mask, void *grad_weight, int64_t batch,
                                          int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                          int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                                          void *workspace, int dtype, int threads);

// The same on a device, y_stats and y_activation applied to z before it is stored; grad is that of z. sample_gradient
// with scale NULL: grad_offset, grad_mask, and in largest (int32, 0 before) the bits of the largest float that the
// gradient of x adds up. With scale: adds the gradient of x, *scale units per 1, to total (batch, height, width, C),
// int64, and nothing else.
FF_EXPORT int ff_cuda_deform_conv_forward(const void *x, const void *offset, const void *mask, const void *weight,
                                          const void *bias, void *z, const void *y_stats, int y_activation,
                                          double y_slope, int64_t batch, int64_t channels, int64_t height,
                                          int64_t width, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                          int64_t stride, int64_t padding, int dtype, void *stream);
FF_EXPORT int ff_cuda_deform_conv_sample_gradient(const void *grad, const void *x, const void *offset, const void *mask,
                                                  const void *weight, void *grad_offset, void *grad_mask, void *largest,
                                                  const double *scale, void *total, int64_t batch, int64_t channels,
                                                  int64_t height, int64_t width, int64_t out_channels, int64_t kernel_h,
                                                  int64_t kernel_w, int64_t stride, int64_t padding, int dtype,
                                                  void *stream);
FF_EXPORT int64_t ff_cuda_deform_conv_weight_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                                       int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                       int64_t stride, int64_t padding);
FF_EXPORT int ff_cuda_deform_conv_weight_gradient(const void *grad, const void *x, const void *offset, const void *mask,
                                                  void *grad_weight, int64_t batch, int64_t channels, int64_t height,
                                                  int64_t width, int64_t out_channels, int64_t kernel_h,
                                                  int64_t kernel_w, int64_t stride, int64_t padding, void *workspace,
                                                  int dtype, void *stream);

// The fusion of a BiFPN node, NHWC: v (batch, height, width, C) = sum of w_i * resampled(x_i) over up to three inputs
// (NULL ends the list) of sizes height_i x width_i, w = relu(fusion_weight) / (sum of relu(fusion_weight (weights,)) +
// epsilon). resample_i is an ff_resample; `same` pads the maximum with zeros.
FF_EXPORT int ff_cpu_bifpn_fuse(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                int resample2, int64_t height0, int64_t width0, int64_t height1, int64_t width1,
                                int64_t height2, int64_t width2, const void *fusion_weight, int64_t weights,
                                double epsilon, int same, int64_t batch, int64_t channels, int64_t height,
                                int64_t width, void *v, int dtype, int threads);
FF_EXPORT int64_t ff_cpu_bifpn_fuse_workspace(int threads);
// Its backward pass, grad being that of v; grad0..2 and grad_weight (weights,) may each be NULL: not wanted.
FF_EXPORT int ff_cpu_bifpn_fuse_backward(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                         int resample2, int64_t height0, int64_t width0, int64_t height1,
                                         int64_t width1, int64_t height2, int64_t width2, const void *fusion_weight,
                                         int64_t weights, double epsilon, int same, int64_t batch, int64_t channels,
                                         int64_t height, int64_t width, const void *grad, void *grad0, void *grad1,
                                         void *grad2, double *grad_weight, void *workspace, int dtype, int threads);

// One application of CBAM to x (batch, height, width, C), in two calls with a batch normalisation between them.
// maps: pooled (2, batch, C), the mean and maximum per channel; gate (batch, C) = sigmoid(MLP(mean) + MLP(maximum)),
// the MLP (hidden, mlp_width), (hidden,), (mlp_width, hidden), (mlp_width,), biases NULL or not, on every chunk of
// mlp_width channels; maps (batch, 2 groups, height, width), the mean and maximum of x * gate over each group's
// channels, spatial_order 1: maximum first; z (batch, groups, height, width), their convolution with conv_weight
// (groups, 2, kernel, kernel). apply: y = x * gate * spatial + residual (NULL: 0), relu of that, spatial (batch,
// groups, pixels).
FF_EXPORT int64_t ff_cpu_cbam_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                        int64_t hidden, int64_t mlp_width, int64_t groups, int64_t kernel,
                                        int spatial_order, int dtype, int threads);
FF_EXPORT int ff_cpu_cbam_maps(const void *x, const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                               const void *fc2_bias, const void *conv_weight, void *pooled, void *gate, void *maps,
                               void *z, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t hidden,
                               int64_t mlp_width, int64_t groups, int64_t kernel, int spatial_order, void *workspace,
                               int dtype, int threads);
// stats (4, groups), see above, of z over images and pixels where `training`, else given; spatial (batch, groups,
// pixels) = sigmoid((z - mean) * scale + shift).
FF_EXPORT int64_t ff_cpu_cbam_gate_workspace(int64_t batch, int64_t groups);
FF_EXPORT int ff_cpu_cbam_gate(const void *z, const void *bn_weight, const void *bn_bias, double eps, int training,
                               void *stats, void *spatial, int64_t batch, int64_t groups, int64_t pixels,
                               void *workspace, int dtype, int threads);
// The gradients of z, bn_weight and bn_bias; the last two may be NULL.
FF_EXPORT int ff_cpu_cbam_gate_gradient(const void *grad_spatial, const void *spatial, const void *z, const void *stats,
                                        int training, double eps, void *grad_z, void *grad_weight, void *grad_bias,
                                        int64_t batch, int64_t groups, int64_t pixels, void *workspace, int dtype,
                                        int threads);
FF_EXPORT int ff_cpu_cbam_apply(const void *x, const void *gate, const void *spatial, const void *residual, int relu,
                                void *y, int64_t batch, int64_t channels, int64_t pixels, int64_t groups, int dtype,
                                int threads);
// The backward pass, from grad of y; y is what apply wrote if it ended in a ReLU, else NULL. First the gradient of
// spatial, then, from grad_z of z, all others: grad_x includes grad itself where add_grad (the residual was x); it may
// be NULL, and so may grad_conv.
FF_EXPORT int ff_cpu_cbam_spatial_gradient(const void *grad, const void *y, const void *x, const void *gate,
                                           void *grad_spatial, int64_t batch, int64_t channels, int64_t pixels,
                                           int64_t groups, int dtype, int threads);
FF_EXPORT int ff_cpu_cbam_backward(const void *grad, const void *y, const void *x, const void *fc1_weight,
                                   const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
                                   const void *conv_weight, const void *pooled, const void *gate, const void *maps,
                                   const void *spatial, const void *grad_z, int add_grad, void *grad_x,
                                   double *grad_fc1_weight, double *grad_fc1_bias, double *grad_fc2_weight,
                                   double *grad_fc2_bias, double *grad_conv, int64_t batch, int64_t channels,
                                   int64_t height, int64_t width, int64_t hidden, int64_t mlp_width, int64_t groups,
                                   int64_t kernel, int spatial_order, void *workspace, int dtype, int threads);

// CBAM on a device, with everything but x, y, the residual and their gradients in float32; maps (batch, pixels, 2
// groups) and z, spatial, shares (batch, pixels, groups) are NHWC. Their convolution and batch normalisation in between
// are ff_cuda_conv_* and ff_cuda_batch_norm_*. apply: spatial = sigmoid(batch norm of z), then y. spatial_gradient:
// from grad of y the gradient of the batch norm's output, and one over the number of channels that are the maximum.
// backward: from grad_maps all others, as above.
FF_EXPORT int64_t ff_cuda_cbam_workspace(int64_t batch, int64_t channels, int64_t pixels, int64_t hidden,
                                         int64_t mlp_width);
FF_EXPORT int ff_cuda_cbam_maps(const void *x, const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                                const void *fc2_bias, void *pooled, void *gate, void *maps, int64_t batch,
                                int64_t channels, int64_t pixels, int64_t hidden, int64_t mlp_width, int64_t groups,
                                int spatial_order, void *workspace, int dtype, void *stream);
FF_EXPORT int ff_cuda_cbam_apply(const void *x, const void *gate, const void *z, const void *z_stats,
                                 const void *residual, int relu, void *spatial, void *y, int64_t batch,
                                 int64_t channels, int64_t pixels, int64_t groups, int dtype, void *stream);
FF_EXPORT int ff_cuda_cbam_spatial_gradient(const void *grad, const void *y, const void *x, const void *gate,
                                            const void *maps, const void *spatial, void *grad_normalised, void *shares,
                                            int64_t batch, int64_t channels, int64_t pixels, int64_t groups,
                                            int spatial_order, int dtype, void *stream);
FF_EXPORT int ff_cuda_cbam_backward(const void *grad, const void *y, const void *x, const void *fc1_weight,
                                    const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
                                    const void *pooled, const void *gate, const void *maps, const void *grad_maps,
                                    const void *spatial, const void *shares, int add_grad, void *grad_x,
                                    void *grad_fc1_weight, void *grad_fc1_bias, void *grad_fc2_weight,
                                    void *grad_fc2_bias, int64_t batch, int64_t channels, int64_t pixels,
                                    int64_t hidden, int64_t mlp_width, int64_t groups, int spatial_order,
                                    void *workspace, int dtype, void *stream);

// The fusion of a BiFPN node on a device, as above, with fusion_weight and grad_weight in float32; v is activated
// (FF_NONE or FF_SILU) before it is stored.
FF_EXPORT int ff_cuda_bifpn_fuse(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                 int resample2, int64_t height0, int64_t width0, int64_t height1, int64_t width1,
                                 int64_t height2, int64_t width2, const void *fusion_weight, int64_t weights,
                                 double epsilon, int same, int64_t batch, int64_t channels, int64_t height,
                                 int64_t width, int activation, void *v, int dtype, void *stream);
FF_EXPORT int64_t ff_cuda_bifpn_fuse_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width);
FF_EXPORT int ff_cuda_bifpn_fuse_backward(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                          int resample2, int64_t height0, int64_t width0, int64_t height1,
                                          int64_t width1, int64_t height2, int64_t width2, const void *fusion_weight,
                                          int64_t weights, double epsilon, int same, int64_t batch, int64_t channels,
                                          int64_t height, int64_t width, const void *grad, void *grad0, void *grad1,
                                          void *grad2, void *grad_weight, void *workspace, int dtype, void *stream);

// Up to three raw outputs z_i (pixels, channels_i), channels_i 0 ending the list, with their stats (NULL: as they are):
// y = activation(batch norm) of their concatenation, shuffled. split: from the gradient of y those of the batch
// normalised values, g_i (pixels, channels_i).
FF_EXPORT int ff_cuda_seam_join(const void *z0, int64_t channels0, const void *stats0, const void *z1,
                                int64_t channels1, const void *stats1, const void *z2, int64_t channels2,
                                const void *stats2, int activation, int64_t pixels, int64_t groups, void *y, int dtype,
                                void *stream);
FF_EXPORT int ff_cuda_seam_split(const void *grad, const void *z0, int64_t channels0, const void *stats0,
                                 const void *z1, int64_t channels1, const void *stats1, const void *z2,
                                 int64_t channels2, const void *stats2, int activation, int64_t pixels, int64_t groups,
                                 void *g0, void *g1, void *g2, int dtype, void *stream);

// The SSH block of evaluation mode in one kernel, NHWC: y of layers (5, 9) and eps (5,), both in host memory. A layer
// is the addresses of weight, bias, bn_weight, bn_bias, mean and variance (0: none), the dtype of the last four, output
// channels, groups.
// FF_OUT_OF_MEMORY where a tile needs more shared memory than a block has.
FF_EXPORT int ff_cuda_ssh_grouped_eval(const void *x, const int64_t *layers, const double *eps, void *y, int64_t batch,
                                       int64_t channels, int64_t height, int64_t width, int64_t shuffle_groups,
                                       int dtype, void *stream);

// As ff_cpu_multi_head_*, on a device.
FF_EXPORT int ff_cuda_multi_head_scatter(const void *z, int64_t batch, int64_t pixels, int64_t anchors, int softmax,
                                         void *bbox, void *cls, void *landmarks, int64_t first_row, int64_t rows,
                                         int dtype, void *stream);
FF_EXPORT int ff_cuda_multi_head_gather(const void *bbox, const void *cls, const void *landmarks,
                                        const void *probabilities, int64_t batch, int64_t pixels, int64_t anchors,
                                        void *z, int64_t first_row, int64_t rows, int dtype, void *stream);

// A 3x3 depthwise convolution with padding 1 and a 1x1 convolution behind it in one kernel, NHWC, without gradients;
// both as in ff_cuda_conv_forward. FF_NOT_SERVED unless dtype is a half precision, 8 divides both numbers of channels,
// at most 256 go out, tensors begin at multiples of 16 bytes and the device has compute capability 8.0.
FF_EXPORT int ff_cuda_depthwise_separable_eval(const void *x, const void *depthwise_weight, const void *depthwise_bias,
                                               const void *depthwise_stats, int depthwise_activation,
                                               double depthwise_slope, const void *weight, const void *bias, void *y,
                                               const void *y_stats, int y_activation, double y_slope, int64_t batch,
                                               int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                               int64_t stride, int dtype, void *stream);

// Number of CUDA devices, or the negated cudaError_t where the driver cannot say.
FF_EXPORT int ff_cuda_device_count(void);
FF_EXPORT const char *ff_cuda_error_string(int code);

#ifdef __cplusplus
}
#endif
#endif
