//! [`Frames`]: cuts one direction of the byte stream into messages, whatever pieces the bytes come in. It keeps no more
//! of a message's body than its scanner asks for.

use std::fmt;

/// Stands for the tag of the first message of a frontend, which has none.
pub(super) const STARTUP: u8 = 0;

/// A length that no message of the protocol has, or one above the limit.
#[derive(Debug)]
pub(super) struct BadLength;

/// One direction of a connection, message by message: a tag, a length that counts itself, a body.
#[cfg_attr(test, derive(PartialEq))]
pub(super) struct Frames {
    header: [u8; 5],
    /// How many bytes of the header have come.
    header_filled: usize,
    /// How many bytes of the body are still to come, once the header is there.
    body_left: usize,
    /// The beginning of the body, as far as it is wanted.
    prefix: Vec<u8>,
}

impl Frames {
    pub(super) fn new() -> Frames {
        Frames { header: [0; 5], header_filled: 0, body_left: 0, prefix: Vec::new() }
    }

    /// The frontend's direction. Its first message has no tag, and is read as if the tag [`STARTUP`] had come before
    /// it.
    pub(super) fn untagged_first() -> Frames {
        Frames { header: [STARTUP; 5], header_filled: 1, ..Frames::new() }
    }

    /// Takes bytes up to the end of a message, and returns its tag if the end was among them. `prefix` says how many
    /// bytes of the body are wanted of each kind of message. No body may have more than `longest` bytes.
    #[inline]
    pub(super) fn next(
        &mut self,
        bytes: &mut &[u8],
        prefix: impl Fn(u8) -> usize,
        longest: usize,
    ) -> Result<Option<u8>, BadLength> {
        // As a rule messages come whole. Such a one is not put together first.
        if self.header_filled == 0 {
            if let Some((&header, rest)) = bytes.split_first_chunk::<5>() {
                if let Some(body) = body_length(header).filter(|&body| body <= longest && body <= rest.len()) {
                    let tag = header[0];
                    self.header = header;
                    self.prefix.clear();
                    let wanted = prefix(tag).min(body);
                    if wanted > 0 {
                        self.prefix.extend_from_slice(&rest[..wanted]);
                    }
                    *bytes = &rest[body..];
                    return Ok(Some(tag));
                }
            }
        }
        self.next_in_pieces(bytes, prefix, longest)
    }

    #[cold]
    fn next_in_pieces(
        &mut self,
        bytes: &mut &[u8],
        prefix: impl Fn(u8) -> usize,
        longest: usize,
    ) -> Result<Option<u8>, BadLength> {
        if self.header_filled < 5 {
            let piece = split_off(bytes, 5 - self.header_filled);
            self.header[self.header_filled..][..piece.len()].copy_from_slice(piece);
            self.header_filled += piece.len();
            if self.header_filled < 5 {
                return Ok(None);
            }
            self.body_left = body_length(self.header).filter(|&body| body <= longest).ok_or(BadLength)?;
            self.prefix.clear();
        }
        let tag = self.header[0];
        let piece = split_off(bytes, self.body_left);
        self.body_left -= piece.len();
        let room = prefix(tag).saturating_sub(self.prefix.len());
        self.prefix.extend_from_slice(&piece[..piece.len().min(room)]);
        if self.body_left > 0 {
            return Ok(None);
        }
        self.header_filled = 0;
        Ok(Some(tag))
    }

    /// The header of the last message: its tag, and its length as it was sent.
    pub(super) fn header(&self) -> (u8, [u8; 4]) {
        let [tag, length @ ..] = self.header;
        (tag, length)
    }

    /// The beginning of the last message's body.
    pub(super) fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// How many bytes of memory the kept part of a message takes.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.prefix.capacity()
    }

    /// How long the last message was, its header included.
    pub(super) fn length(&self) -> usize {
        let [_, length @ ..] = self.header;
        u32::from_be_bytes(length) as usize + 1
    }

    /// How many bytes are still to come of a body whose header is there.
    pub(super) fn body_left(&self) -> usize {
        self.body_left
    }

    /// Whether the beginning of a message has come, and its end has not.
    pub(super) fn is_inside(&self) -> bool {
        self.header_filled > 0
    }
}

/// Without the bodies: one may hold a secret.
impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames")
            .field("header", &self.header)
            .field("body_left", &self.body_left)
            .finish_non_exhaustive()
    }
}

/// How long the body is that follows a header; `None`: no body has this length.
#[inline]
fn body_length(header: [u8; 5]) -> Option<usize> {
    let [_, length @ ..] = header;
    // The length is signed, as `postgres` reads it.
    i32::from_be_bytes(length).checked_sub(4).and_then(|body| usize::try_from(body).ok())
}

/// Takes up to `at_most` bytes off the front.
pub(super) fn split_off<'a>(bytes: &mut &'a [u8], at_most: usize) -> &'a [u8] {
    let (piece, rest) = bytes.split_at(at_most.min(bytes.len()));
    *bytes = rest;
    piece
}
