#include "inflate/span_decoder.h"

#include <zstd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "error.h"
#include "inflate/isal.h"
#include "inflate/node_zlib.h"

namespace dedup::inflate {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error("LAYER_INVALID", what); }

// A z_stream that is always ended.
class Inflater {
 public:
  explicit Inflater(int window_bits) {
    if (inflateInit2(&stream, window_bits) != Z_OK) throw std::bad_alloc();
  }
  ~Inflater() { inflateEnd(&stream); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;
  z_stream stream{};
};

const char* detail_of(const z_stream& stream) { return stream.msg != nullptr ? stream.msg : "inflate failed"; }

void prime(z_stream& stream, const Span& span) {
  if (span.bits > 0) {
    const int value = span.input[span.input_offset - 1] >> (8 - span.bits);
    if (inflatePrime(&stream, static_cast<int>(span.bits), value) != Z_OK) invalid("inflatePrime failed");
  }
  if (!span.window.empty() &&
      inflateSetDictionary(&stream, span.window.data(), static_cast<uInt>(span.window.size())) != Z_OK) {
    invalid("the window of the restart point is refused");
  }
}

void decode_gzip(const Span& span) {
  if (span.bits > 7 || (span.bits > 0 && span.input_offset == 0)) invalid("the restart point has no such bits");
  if (span.window.size() > kWindowBytes) invalid("the window of the restart point is above 32 KiB");
  // Nearly every span: the middle of a member, and all of the slice lies in it. zlib has the word on whatever is odd.
  if (!span.member_start) {
    const std::uint32_t first_bits = span.bits > 0 ? span.input[span.input_offset - 1] >> (8 - span.bits) : 0;
    if (isal_inflate_raw(span.input.subspan(span.input_offset), span.bits, first_bits, span.window, span.output))
      return;
  }
  // In the middle of a member only its blocks can be read, and its CRC cannot be checked; later members are whole.
  bool raw = !span.member_start;
  Inflater inflater(raw ? kRawWindowBits : kGzipWindowBits);
  z_stream& stream = inflater.stream;
  if (raw) prime(stream, span);

  std::size_t in = span.input_offset;
  std::size_t out = 0;
  while (out < span.output.size()) {
    const uInt avail_in = static_cast<uInt>(std::min<std::size_t>(span.input.size() - in, UINT_MAX / 2));
    const uInt avail_out = static_cast<uInt>(std::min<std::size_t>(span.output.size() - out, UINT_MAX / 2));
    stream.next_in = const_cast<Bytef*>(span.input.data() + in);
    stream.avail_in = avail_in;
    stream.next_out = span.output.data() + out;
    stream.avail_out = avail_out;
    const int status = ::inflate(&stream, Z_NO_FLUSH);
    in += avail_in - stream.avail_in;
    out += avail_out - stream.avail_out;
    if (status == Z_STREAM_END) {
      if (out == span.output.size()) return;
      if (raw) {
        if (span.input.size() - in < kGzipTrailerBytes) invalid("the compressed bytes end too early");
        in += kGzipTrailerBytes;
        raw = false;
      }
      if (in == span.input.size()) invalid("the compressed bytes end too early");
      if (inflateReset2(&stream, kGzipWindowBits) != Z_OK) invalid("inflateReset2 failed");
      continue;
    }
    if (status == Z_MEM_ERROR) throw std::bad_alloc();
    if (status == Z_BUF_ERROR ||
        (status == Z_OK && in == span.input.size() && out < span.output.size() && stream.avail_out != 0)) {
      invalid("the compressed bytes end too early");
    }
    if (status != Z_OK) invalid(detail_of(stream));
  }
}

struct FreeContext {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

void decode_zstd(const Span& span) {
  std::unique_ptr<ZSTD_DCtx, FreeContext> context(ZSTD_createDCtx());
  if (context == nullptr) throw std::bad_alloc();
  std::size_t in = span.input_offset;
  std::size_t out = 0;
  while (out < span.output.size()) {
    const std::uint8_t* from = span.input.data() + in;
    const std::size_t left = span.input.size() - in;
    std::uint8_t* to = span.output.data() + out;
    const std::size_t room = span.output.size() - out;
    if (left == 0) invalid("the compressed bytes end too early");

    // A whole frame that fits is decoded straight into its place; only the last one may have to be cut short.
    const std::size_t frame = ZSTD_findFrameCompressedSize(from, left);
    const unsigned long long content =
        ZSTD_isError(frame) ? ZSTD_CONTENTSIZE_UNKNOWN : ZSTD_getFrameContentSize(from, left);
    if (content <= room) {  // both "unknown" and "error" are above any room
      const std::size_t made = ZSTD_decompressDCtx(context.get(), to, room, from, frame);
      if (ZSTD_isError(made)) invalid(ZSTD_getErrorName(made));
      in += frame;
      out += made;
      continue;
    }
    ZSTD_inBuffer input{from, left, 0};
    ZSTD_outBuffer output{to, room, 0};
    ZSTD_DCtx_reset(context.get(), ZSTD_reset_session_only);
    for (std::size_t status = 1; status != 0 && output.pos < output.size;) {
      const std::size_t before = input.pos + output.pos;
      status = ZSTD_decompressStream(context.get(), &output, &input);
      if (ZSTD_isError(status)) invalid(ZSTD_getErrorName(status));
      if (status != 0 && input.pos + output.pos == before) invalid("the compressed bytes end too early");
    }
    in += input.pos;
    out += output.pos;
  }
}

}  // namespace

void decode_span(Compression compression, const Span& span) {
  if (span.input_offset > span.input.size()) invalid("the span starts after the end of its compressed bytes");
  if (span.output.empty()) return;
  switch (compression) {
    case Compression::kNone:
      if (span.input.size() - span.input_offset < span.output.size()) invalid("the bytes end too early");
      std::memcpy(span.output.data(), span.input.data() + span.input_offset, span.output.size());
      return;
    case Compression::kGzip:
      decode_gzip(span);
      return;
    case Compression::kZstd:
      decode_zstd(span);
      return;
  }
}

}  // namespace dedup::inflate
