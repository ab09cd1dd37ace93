//! What servers say to each other about what they hold, so that it can be compared: see [`crate::engine::scrub`].

use crate::chunk::Digest;
use crate::paxos::message::SyncMessage;
use crate::types::{ChunkIndex, ServerId, Slot, VolumeId};
use crate::wire::DecodeError;
use crate::wire::codec::{Input, Output};

/// Chunks of one point whose digests are told one by one: the answer fits a datagram.
pub const POINT_CHUNKS_MAX: usize = 16;
const CHUNK_BYTES_MIN: usize = 5;

/// Asks for what chunks hold at one slot. Sent again until it is answered.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PointRequest {
    /// Names the survey that it is for; random.
    pub id: u64,
    /// After the entry of this slot. Who has applied a later one cannot tell any more.
    pub at: Slot,
    /// Of which volume.
    pub volume: VolumeId,
    /// From this chunk on.
    pub from: ChunkIndex,
    /// At most so many chunks that exist, each with its digest, up to [`POINT_CHUNKS_MAX`]; 0: all, and one digest for them together.
    pub chunks_max: u32,
    /// Nobody waits: it is to disturb nobody either.
    pub calm: bool,
}

/// Answer to [`PointRequest`]: how far it is.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PointAnswer {
    /// Of the request.
    pub id: u64,
    /// Of the request.
    pub at: Slot,
    /// How far.
    pub stage: PointStage,
}

/// How far a server is with what it was asked for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum PointStage {
    /// The slot is not applied yet.
    Waiting {
        /// What is.
        applied: Slot,
    },
    /// It reads.
    Running {
        /// Chunks that it has read,
        done: u64,
        /// of so many.
        total: u64,
    },
    /// It cannot tell.
    Refused(PointRefusal),
    /// What it holds.
    Done(PointResult),
}

/// Why a server cannot tell what it holds.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PointRefusal {
    /// It has applied later entries already, or was started anew.
    Passed,
    /// Its own data are not complete.
    Incomplete,
    /// It knows no such volume.
    NoVolume,
    /// It has too much of this to do.
    Busy,
    /// Too much was overwritten while it read.
    Overwritten,
    /// Its disk failed.
    Unreadable,
    /// A reason of a later version.
    Other(u8),
}

/// What a server holds.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct PointResult {
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// The chunks below this one were looked at; none: all.
    pub until: Option<ChunkIndex>,
    /// The volume's digest, if all chunks were asked for and no block is damaged.
    pub digest: Option<Digest>,
    /// Blocks that were compared with their checksums.
    pub blocks: u64,
    /// Of these, damaged ones.
    pub bad: u64,
    /// Chunks that exist there, ascending; without a digest if a block is damaged. Empty if all were asked for.
    pub chunks: Vec<(ChunkIndex, Option<Digest>)>,
}

/// A chunk of the receiver is not what the majority has: it shall take another server's.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct MendRequest {
    /// Of the survey.
    pub id: u64,
    /// Slot at which they were compared.
    pub at: Slot,
    /// Of which volume.
    pub volume: VolumeId,
    /// Which.
    pub chunk: ChunkIndex,
    /// Who has what the majority has.
    pub from: ServerId,
}

/// Answer to [`MendRequest`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct MendAnswer {
    /// Of the survey.
    pub id: u64,
    /// Of the request.
    pub at: Slot,
    /// Which.
    pub chunk: ChunkIndex,
    /// How many blocks were replaced; none: not yet.
    pub blocks: Option<u32>,
}

pub(super) fn encode(message: &SyncMessage, put: &mut Output<'_>) {
    match message {
        SyncMessage::TakePoint(request) => {
            put.u8(43);
            put.u64(request.id);
            put.u64(request.at.0);
            put.u32(request.volume.0);
            put.u32(request.from.0);
            put.u32(request.chunks_max);
            put.flag(request.calm);
        }
        SyncMessage::Point(answer) => {
            put.u8(44);
            put.u64(answer.id);
            put.u64(answer.at.0);
            answer.stage.encode(put);
        }
        SyncMessage::Mend(request) => {
            put.u8(45);
            put.u64(request.id);
            put.u64(request.at.0);
            put.u32(request.volume.0);
            put.u32(request.chunk.0);
            put.u8(request.from.0);
        }
        SyncMessage::Mended(answer) => {
            put.u8(46);
            put.u64(answer.id);
            put.u64(answer.at.0);
            put.u32(answer.chunk.0);
            put.flag(answer.blocks.is_some());
            put.u32(answer.blocks.unwrap_or_default());
        }
        _ => {}
    }
}

pub(super) fn decode(code: u8, input: &mut Input<'_>) -> Result<SyncMessage, DecodeError> {
    Ok(match code {
        43 => SyncMessage::TakePoint(PointRequest {
            id: input.u64()?,
            at: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            from: ChunkIndex(input.u32()?),
            chunks_max: input.u32()?,
            calm: input.flag()?,
        }),
        44 => SyncMessage::Point(PointAnswer {
            id: input.u64()?,
            at: Slot(input.u64()?),
            stage: PointStage::decode(input)?,
        }),
        45 => SyncMessage::Mend(MendRequest {
            id: input.u64()?,
            at: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            chunk: ChunkIndex(input.u32()?),
            from: ServerId(input.u8()?),
        }),
        46 => {
            let (id, at) = (input.u64()?, Slot(input.u64()?));
            let chunk = ChunkIndex(input.u32()?);
            let (is_done, blocks) = (input.flag()?, input.u32()?);
            SyncMessage::Mended(MendAnswer {
                id,
                at,
                chunk,
                blocks: is_done.then_some(blocks),
            })
        }
        code => {
            return Err(DecodeError::UnknownCode {
                what: "message",
                code,
            });
        }
    })
}

impl PointStage {
    fn encode(&self, put: &mut Output<'_>) {
        match self {
            PointStage::Waiting { applied } => {
                put.u8(0);
                put.u64(applied.0);
            }
            PointStage::Running { done, total } => {
                put.u8(1);
                put.u64(*done);
                put.u64(*total);
            }
            PointStage::Refused(refusal) => {
                put.u8(2);
                put.u8(refusal.code());
            }
            PointStage::Done(result) => {
                put.u8(3);
                put.u64(result.size_bytes);
                put.flag(result.until.is_some());
                put.u32(result.until.unwrap_or_default().0);
                put.digest(result.digest);
                put.u64(result.blocks);
                put.u64(result.bad);
                put.u32(result.chunks.len() as u32);
                for (chunk, digest) in &result.chunks {
                    put.u32(chunk.0);
                    put.digest(*digest);
                }
            }
        }
    }

    fn decode(input: &mut Input<'_>) -> Result<PointStage, DecodeError> {
        Ok(match input.u8()? {
            0 => PointStage::Waiting {
                applied: Slot(input.u64()?),
            },
            1 => PointStage::Running {
                done: input.u64()?,
                total: input.u64()?,
            },
            2 => PointStage::Refused(PointRefusal::of(input.u8()?)),
            3 => {
                let size_bytes = input.u64()?;
                let (is_part, until) = (input.flag()?, ChunkIndex(input.u32()?));
                let digest = input.digest()?;
                let (blocks, bad) = (input.u64()?, input.u64()?);
                let count = input.count(CHUNK_BYTES_MIN)?;
                if count > POINT_CHUNKS_MAX {
                    return Err(DecodeError::TooLong {
                        what: "list of digests",
                        have: count as u64,
                        most: POINT_CHUNKS_MAX as u64,
                    });
                }
                let mut chunks = Vec::with_capacity(count);
                for _ in 0..count {
                    chunks.push((ChunkIndex(input.u32()?), input.digest()?));
                }
                PointStage::Done(PointResult {
                    size_bytes,
                    until: is_part.then_some(until),
                    digest,
                    blocks,
                    bad,
                    chunks,
                })
            }
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "stage of a point",
                    code,
                });
            }
        })
    }
}

impl PointRefusal {
    fn code(self) -> u8 {
        match self {
            PointRefusal::Passed => 0,
            PointRefusal::Incomplete => 1,
            PointRefusal::NoVolume => 2,
            PointRefusal::Busy => 3,
            PointRefusal::Overwritten => 4,
            PointRefusal::Unreadable => 5,
            PointRefusal::Other(code) => code,
        }
    }

    fn of(code: u8) -> PointRefusal {
        match code {
            0 => PointRefusal::Passed,
            1 => PointRefusal::Incomplete,
            2 => PointRefusal::NoVolume,
            3 => PointRefusal::Busy,
            4 => PointRefusal::Overwritten,
            5 => PointRefusal::Unreadable,
            code => PointRefusal::Other(code),
        }
    }

    /// For people.
    pub fn reason(self) -> &'static str {
        match self {
            PointRefusal::Passed => "it had applied later entries already, or was started anew",
            PointRefusal::Incomplete => "its own data are not complete yet",
            PointRefusal::NoVolume => "it knows no such volume",
            PointRefusal::Busy => "it has too much of this to do",
            PointRefusal::Overwritten => {
                "too much was overwritten or trimmed while it read; ask again when less is written"
            }
            PointRefusal::Unreadable => "its disk could not be read; see its log",
            PointRefusal::Other(_) => "for a reason that this version does not know",
        }
    }
}

impl Output<'_> {
    fn digest(&mut self, digest: Option<Digest>) {
        self.flag(digest.is_some());
        if let Some(digest) = digest {
            self.bytes(&digest.0);
        }
    }
}

impl Input<'_> {
    fn digest(&mut self) -> Result<Option<Digest>, DecodeError> {
        Ok(match self.flag()? {
            true => Some(Digest(self.array()?)),
            false => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<(SyncMessage, u8, &'static str)> {
        let done = PointResult {
            size_bytes: 1 << 20,
            until: Some(ChunkIndex(9)),
            digest: None,
            blocks: 3,
            bad: 1,
            chunks: vec![(ChunkIndex(8), None)],
        };
        let answer = |stage| {
            SyncMessage::Point(PointAnswer {
                id: 2,
                at: Slot(3),
                stage,
            })
        };
        vec![
            (
                SyncMessage::TakePoint(PointRequest {
                    id: 2,
                    at: Slot(3),
                    volume: VolumeId(4),
                    from: ChunkIndex(5),
                    chunks_max: 6,
                    calm: true,
                }),
                43,
                "0200000000000000 0300000000000000 04000000 05000000 06000000 01",
            ),
            (
                answer(PointStage::Waiting { applied: Slot(1) }),
                44,
                "0200000000000000 0300000000000000 00 0100000000000000",
            ),
            (
                answer(PointStage::Refused(PointRefusal::Overwritten)),
                44,
                "0200000000000000 0300000000000000 02 04",
            ),
            (
                answer(PointStage::Done(done)),
                44,
                "0200000000000000 0300000000000000 03 0000100000000000 01 09000000 00 0300000000000000 0100000000000000 \
                 01000000 08000000 00",
            ),
            (
                SyncMessage::Mend(MendRequest {
                    id: 2,
                    at: Slot(3),
                    volume: VolumeId(4),
                    chunk: ChunkIndex(5),
                    from: ServerId(1),
                }),
                45,
                "0200000000000000 0300000000000000 04000000 05000000 01",
            ),
            (
                SyncMessage::Mended(MendAnswer {
                    id: 2,
                    at: Slot(3),
                    chunk: ChunkIndex(5),
                    blocks: Some(7),
                }),
                46,
                "0200000000000000 0300000000000000 05000000 01 07000000",
            ),
        ]
    }

    #[test]
    fn literal_messages() {
        for (message, code, text) in messages() {
            let digits: Vec<u8> = text.bytes().filter(|it| *it != b' ').collect();
            let bytes = digits
                .chunks(2)
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
            let expected: Vec<u8> = std::iter::once(code).chain(bytes).collect();
            let mut encoded = Vec::new();
            encode(&message, &mut Output(&mut encoded));
            assert_eq!(encoded, expected, "{message:?}");
            let mut input = Input(&encoded[1..]);
            assert_eq!(decode(code, &mut input), Ok(message));
            assert!(input.0.is_empty());
            for cut in 1..encoded.len() {
                assert!(decode(code, &mut Input(&encoded[1..cut])).is_err());
            }
        }
    }

    #[test]
    fn refusals_keep_their_codes() {
        for code in 0..=u8::MAX {
            assert_eq!(PointRefusal::of(code).code(), code);
        }
    }

    #[test]
    fn lists_are_bounded() {
        let result = PointResult {
            chunks: vec![(ChunkIndex(1), None); POINT_CHUNKS_MAX + 1],
            ..PointResult::default()
        };
        let mut encoded = Vec::new();
        PointStage::Done(result).encode(&mut Output(&mut encoded));
        let decoded = PointStage::decode(&mut Input(&encoded));
        assert!(matches!(decoded, Err(DecodeError::TooLong { .. })));
    }
}
