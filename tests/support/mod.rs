//! What the integration tests share.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of this")]

pub mod debian;
pub mod engine;
pub mod gate;
pub mod images;
pub mod live;
pub mod node;
pub mod radosgw;
pub mod rivals;
pub mod road;
pub mod s3_server;
pub mod server;
pub mod specs;
