//! Frames on a byte stream: `u32` little-endian byte count, then one prost message.
//!
//! Framed by hand, not gRPC: the peers are one parent and its own child, both sides are plain threads, and a step's round
//! trip must cost tens of microseconds.

use std::io::{self, Read, Write};

use prost::Message;

/// The largest frame either side accepts, bytes. A step of 256 sequences with full prompts stays far below.
pub const FRAME_BYTES_MAX: usize = 256 << 20;

/// Writes one message with a single `write_all`, so that a frame is never interleaved with another.
///
/// # Errors
/// The stream's own, and [`io::ErrorKind::InvalidData`] for a message over [`FRAME_BYTES_MAX`].
pub fn write<M: Message>(stream: &mut impl Write, scratch: &mut Vec<u8>, message: &M) -> io::Result<()> {
    let bytes = message.encoded_len();
    let Some(header) = u32::try_from(bytes).ok().filter(|_| bytes <= FRAME_BYTES_MAX) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {bytes} bytes is over the limit")));
    };
    scratch.clear();
    scratch.extend_from_slice(&header.to_le_bytes());
    message.encode(scratch).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    stream.write_all(scratch)
}

/// Reads one message; `Ok(None)` when the peer closed the stream between two frames.
///
/// # Errors
/// The stream's own, [`io::ErrorKind::InvalidData`] for a frame over [`FRAME_BYTES_MAX`] or one that does not decode,
/// [`io::ErrorKind::UnexpectedEof`] for a frame cut short.
pub fn read<M: Message + Default>(stream: &mut impl Read, scratch: &mut Vec<u8>) -> io::Result<Option<M>> {
    let mut header = [0u8; 4];
    let mut filled = 0;
    while filled < header.len() {
        match stream.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let bytes = u32::from_le_bytes(header) as usize;
    if bytes > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {bytes} bytes is over the limit")));
    }
    scratch.resize(bytes, 0);
    stream.read_exact(scratch)?;
    M::decode(scratch.as_slice()).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Step, ToShard, to_shard::Body};

    #[test]
    fn frames_come_out_as_they_went_in_and_a_clean_close_is_none() {
        let (mut wire, mut scratch) = (Vec::new(), Vec::new());
        for id in 0..3 {
            let message = ToShard { body: Some(Body::Step(Step { id, ..Step::default() })) };
            write(&mut wire, &mut scratch, &message).unwrap();
        }
        let mut stream = wire.as_slice();
        for want in 0..3 {
            let got: ToShard = read(&mut stream, &mut scratch).unwrap().unwrap();
            assert!(matches!(got.body, Some(Body::Step(step)) if step.id == want));
        }
        assert!(read::<ToShard>(&mut stream, &mut scratch).unwrap().is_none());
    }

    #[test]
    fn a_cut_frame_and_a_huge_length_are_errors() {
        let mut scratch = Vec::new();
        let cut: &[u8] = &[9, 0, 0, 0, 1, 2];
        assert_eq!(read::<ToShard>(&mut { cut }, &mut scratch).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let half_header: &[u8] = &[9, 0];
        assert_eq!(
            read::<ToShard>(&mut { half_header }, &mut scratch).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let huge: &[u8] = &[255, 255, 255, 255];
        assert_eq!(read::<ToShard>(&mut { huge }, &mut scratch).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
